"""From a source and a recipe to a folded model: `plan` says how, free of torch; the rest of the package does it."""
