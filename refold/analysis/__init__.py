"""What can be known of a source before it is folded: measured, drawn, and written down for recipes."""
