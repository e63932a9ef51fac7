"""`refold plan`: cost and contents of a folded model before conversion."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from refold.cli import options
from refold.cli.show import print_json

if TYPE_CHECKING:
    from refold.planning.plan import StackPlan


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
    for_: Annotated[
        str | None, typer.Option("--for", metavar="ENGINE", help="Also say how this engine or format holds the result.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Show the cost and contents of a folded model before conversion, from config.json and file headers alone.

    Without --recipe and --set one table compares all built-in recipes. A folder with only config.json can be planned.
    """
    from refold.cli.export_tables import held_json, print_held
    from refold.cli.plan_tables import as_json, print_all, print_plan
    from refold.exporting.registry import targets_for
    from refold.planning.plan import plan, plan_all

    targets = [] if for_ is None else targets_for(for_)

    def whole(made: "StackPlan") -> dict[str, Any]:
        return {**as_json(made), **({"for": held_json(made.blueprint, targets)} if targets else {})}

    if recipe is None and not set_:
        planned = plan_all(source, measurements)
        if json:
            print_json({each.name: each.error or (each.plan and whole(each.plan)) for each in planned})
        else:
            print_all(planned, context)
            print_held({each.name: each.plan.blueprint for each in planned if each.plan is not None}, targets)
        return
    made = plan(source, recipe, set_ or (), allow_larger, measurements)
    if json:
        print_json(whole(made))
    else:
        print_plan(made, context, lines)
        print_held({recipe or "this recipe": made.blueprint}, targets)
