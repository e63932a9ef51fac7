"""`refold plan`: cost and contents of a folded model before conversion."""

from typing import Annotated

import typer

from refold.cli import options
from refold.cli.show import print_json


def command(
    source: options.SourceOption,
    recipe: options.RecipeOption = None,
    set_: options.Set = None,
    measurements: options.MeasurementsOption = None,
    context: Annotated[
        int, typer.Option(parser=options.whole(1), metavar="N", help="Context at which cache and FLOPs are counted.")
    ] = 8192,
    lines: Annotated[bool, typer.Option("--lines", help="Also show the origin of every tensor group.")] = False,
    allow_larger: options.AllowLarger = False,
    json: options.Json = False,
) -> None:
    """Show the cost and contents of a folded model before conversion, from config.json and file headers alone.

    Without --recipe and --set one table compares all built-in recipes. A folder with only config.json can be planned.
    """
    from refold.cli.plan_tables import as_json, print_all, print_plan
    from refold.planning.plan import plan, plan_all

    if recipe is None and not set_:
        planned = plan_all(source, measurements)
        if json:
            print_json({each.name: each.error or (each.plan and as_json(each.plan)) for each in planned})
        else:
            print_all(planned, context)
        return
    made = plan(source, recipe, set_ or (), allow_larger, measurements)
    if json:
        print_json(as_json(made))
    else:
        print_plan(made, context, lines)
