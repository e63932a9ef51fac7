"""`refold recipes`: the built-in recipes."""

from importlib.resources import files
from typing import Annotated

import typer

from refold.cli.options import Json
from refold.cli.show import print_json, print_table


def command(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe's YAML, to be changed and used by its path.")
    ] = None,
    protocols: Annotated[bool, typer.Option("--protocols", help="List the healing protocols instead.")] = False,
    json: Json = False,
) -> None:
    """List the built-in recipes or healing protocols, or print one recipe."""
    from refold.recipe.heal import built_in_protocols
    from refold.recipe.load import built_in_recipes, load_recipe

    if protocols:
        listed = built_in_protocols()
        print_json(listed) if json else print_table(("protocol", "description"), list(listed.items()))
        return
    if name is not None:
        loaded = load_recipe(name)
        print_json(loaded) if json else typer.echo(
            (files("refold.recipes") / f"{name}.yaml").read_text("utf-8"), nl=False
        )
    elif json:
        print_json(built_in_recipes())
    else:
        print_table(("recipe", "description"), list(built_in_recipes().items()))
