"""Evaluation of a model on held-out text, alone or against its source."""
