"""How well a model predicts a text, alone or beside its source, as one file."""
