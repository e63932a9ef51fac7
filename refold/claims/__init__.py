"""Claims: the comparisons of the papers that refold builds on, measured at matched tokens, each with a verdict."""
