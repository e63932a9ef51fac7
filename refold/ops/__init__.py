"""Recurrences of linear-cost token mixers as pure tensor functions, each as a token loop, a single step and in chunks."""
