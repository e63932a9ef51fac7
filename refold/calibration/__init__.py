"""A source run layer by layer on text: moments, weightings, curves and similarities."""
