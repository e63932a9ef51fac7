"""Source models: their description, their tensors, and their measurements."""
