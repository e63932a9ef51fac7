"""The built-in recipes, one YAML file each; `refold.recipe.load` reads them."""
