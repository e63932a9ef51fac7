"""Torch-free halves of the plug points: which tensors a part has, what it costs, what can be transferred to it."""
