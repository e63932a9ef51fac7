"""Source models: finding, describing and reading them, and what was measured of them."""
