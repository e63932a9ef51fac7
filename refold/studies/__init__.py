"""Studies that combine several stages: run, demo, and the shipped model with its text."""
