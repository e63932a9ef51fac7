"""From a recipe and an architecture to a blueprint, its cost and its notes. Free of torch."""
