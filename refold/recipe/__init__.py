"""The recipe language: one YAML file that describes how a model is folded and healed. Torch-free."""
