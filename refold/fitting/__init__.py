"""Fits a source into a budget: measures the loss of each choice, chooses, looks, and writes a recipe."""
