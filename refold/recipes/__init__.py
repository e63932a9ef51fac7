"""The built-in recipes, one YAML file each; `refold.blueprint.load` reads them."""
