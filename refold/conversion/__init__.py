"""Conversion of a source into a folded model: measurements, fits, and the new model folder."""
