"""`refold convert`: carry out a recipe on a source."""

from typing import Annotated

import typer

from refold.cli import options
from refold.cli.show import note, print_json, progress


def command(
    source: options.SourceOption,
    out: options.Out,
    recipe: options.RecipeOption = None,
    set_: options.Set = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="Text that fits are weighted by and drops measured on; several kinds: A=0.5. Repeatable."),
    ] = None,
    field: options.FieldOption = None,
    measurements: options.MeasurementsOption = None,
    device: options.Device = "cpu",
    overwrite: options.Overwrite = False,
    allow_larger: options.AllowLarger = False,
    json: options.Json = False,
) -> None:
    """Fold a source into a new model folder, with a few matrices in memory at a time."""
    from refold.cli.plan_tables import print_approximation, print_plan
    from refold.conversion.convert import ConvertOptions, convert

    with progress("converting", "steps") as report:
        made = convert(
            source,
            out,
            recipe,
            set_ or (),
            options=ConvertOptions(
                overwrite=overwrite,
                allow_larger=allow_larger,
                device=device or "cpu",
                command=options.command_line(),
                progress=report,
            ),
            calibration=options.locate_data(calibration, field),
            measurements=measurements,
        )
    if json:
        print_json(made)
    else:
        print_plan(made, context=8192, lines=False)
        print_approximation(made.approximation)
    note(f"written: {out}")
