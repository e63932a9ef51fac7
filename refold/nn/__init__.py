"""Small modules that stored parts are built from."""
