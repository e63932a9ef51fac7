"""The claims of each paper as data: one file for each group."""
