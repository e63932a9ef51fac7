"""Fits a source into a budget: measures what each choice costs, chooses, looks, and writes a recipe."""
