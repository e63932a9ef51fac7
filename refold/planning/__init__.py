"""Planning: builds the blueprint, its cost and its notes from a recipe and an architecture. Torch-free."""
