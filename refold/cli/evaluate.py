"""`refold evaluate`: how well a model predicts a text, and how close it stays to its source."""

from pathlib import Path
from typing import Annotated

import typer

from refold.cli import options
from refold.cli.show import print_json, progress


def command(
    model: options.Model,
    data: options.DataOption,
    field: options.Field = None,
    against: Annotated[
        str | None, typer.Option(help="Also compare with this model: agreement, KL, difference.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in a window. Left out: as the model allows.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens a window moves on. Left out: half the context.")] = None,
    max_tokens: Annotated[str | None, typer.Option(help="Read no more than this, such as 200k.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows at a time. Left out: what 4,096 tokens hold.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantise: Annotated[
        str | None, typer.Option(help="int8 or int4: round the weights of linears, and count their bytes so.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the result to this file as JSON.")] = None,
    json: options.Json = False,
) -> None:
    """Measure bits per byte, perplexity and, against another model, agreement and KL."""
    from refold.cli.evaluation_tables import print_evaluation
    from refold.evaluation.evaluate import evaluate

    with progress("evaluating", "windows") as report:
        found = evaluate(
            model,
            options.locate_data(data, field) or (),
            against=against,
            context=context,
            stride=stride,
            max_tokens=options.parse_amount(max_tokens),
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            quantise=quantise,
            progress=report,
        )
    if out is not None:
        found.write(out)
    if json:
        print_json(found)
    else:
        print_evaluation(found)
