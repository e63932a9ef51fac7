"""The recipe language: one YAML file says how a model is folded and healed. Free of torch."""
