"""Mixers and the MLP as typed objects: options, tensors, cost and transfer of one kind of part in one class."""
