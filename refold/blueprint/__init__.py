"""The description of a model that all other packages read: a stack of depths over pools of stored parts. Torch-free."""
