"""`refold quantise`: storing the weights of a model as integers."""

from typing import Annotated

import typer

from refold.cli import options
from refold.cli.show import format_bytes, note, print_json, progress


def command(
    model: options.Model,
    out: options.Out,
    to: Annotated[str, typer.Option("--to", help="int8, or int2 to int6 in groups: int4, int3g128.")] = "int8",
    keep: options.Keep = None,
    layers: options.Layers = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", help="Text, for rounding with error feedback; several kinds: A=0.5. Repeatable."),
    ] = None,
    field: options.FieldOption = None,
    tokens: Annotated[
        int, typer.Option("--tokens", "-t", parser=options.amount, metavar="AMOUNT", help="Tokens of the text to read.")
    ] = 65_536,
    device: options.Device = "cpu",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Write a model whose weights are stored as integers of 2 to 8 bits."""
    from refold.conversion.quantise import QuantiseOptions, quantise

    with progress("rounding", "steps") as report:
        how = QuantiseOptions(
            layers={name: formats.split(",") for name, formats in layers or []},
            overwrite=overwrite,
            device=device or "cpu",
            command=options.command_line(),
            progress=report,
        )
        text = options.locate_data(data, field)
        found = quantise(model, out, to, keep=dict(keep or []), data=text, tokens=tokens, options=how)
    if json:
        print_json(found.figures)
    else:
        print(f"{found.summary}: {format_bytes(found.float_bytes)} -> {format_bytes(found.weight_bytes)}")
    for line in found.notes:
        note(line)
    note(f"written: {out}")
