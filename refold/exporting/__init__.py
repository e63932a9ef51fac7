"""Folded models written in the formats of other programs."""
