"""Code that other engines call, so that they load folded folders as they are; one package for each engine."""
