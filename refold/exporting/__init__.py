"""Exports of folded models to the formats of other programs."""
