"""Built-in healing protocols: YAML files, each a list of stages whose tokens are shares of a budget."""
