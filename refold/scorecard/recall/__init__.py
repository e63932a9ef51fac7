"""Recall on texts made on the spot."""
