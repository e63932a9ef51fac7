"""Few-shot tasks, scored through lm-eval."""
