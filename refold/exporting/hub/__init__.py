"""Folders for a model hub: the stored weights as they are, and one generated file of code that runs them."""
