"""The model of any blueprint, as a transformers model."""
