"""Kinds of tensors that one depth owns: one descriptor each, torch-free."""
