"""Losses and quality figures from hidden states and heads, never holding all logits; knows no model class."""
