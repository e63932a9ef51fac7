"""Text from a model through transformers."""
