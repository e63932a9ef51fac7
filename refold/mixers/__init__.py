"""Mixers and the MLP as typed objects: one class for each, with its options, tensors, cost and transfer. Torch-free."""
