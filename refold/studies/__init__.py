"""Stages wired together: run, demo, and the text that the shipped model was made from."""
