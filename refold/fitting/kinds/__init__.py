"""The kinds of choice of a fit: one file each, and one entry in the registry."""
