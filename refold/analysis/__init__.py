"""Analysis of a source before it is folded: measurements, figures, and advice for recipes."""
