"""Tensor kinds that belong to one depth, such as LoRAs and gains: one class for each. Torch-free."""
