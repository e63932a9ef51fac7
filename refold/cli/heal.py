"""`refold heal`: train what a fold broke."""

from typing import Annotated

import typer

from refold.cli import options
from refold.cli.show import note, print_json


def command(
    model: options.Model,
    out: options.Out,
    data: options.Data,
    tokens: Annotated[str, typer.Option("--tokens", "-t", help="Training tokens, such as 20M.")],
    objective: Annotated[
        str, typer.Option(help="distil (cross-entropy and KL to the source) or next_token.")
    ] = "distil",
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_tokens: Annotated[str | None, typer.Option(help="Tokens for each optimizer step.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in one packed sequence.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the data.")] = 0,
    teacher: Annotated[str | None, typer.Option(help="Folder or hub id. Left out: what MODEL was folded from.")] = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew instead of resuming.")] = False,
    json: options.Json = False,
) -> None:
    """Train one stage. Interrupted, the same command goes on from the last checkpoint."""
    from refold.blueprint.load import load_recipe
    from refold.healing.heal import heal

    given = {
        "tokens": tokens,
        "objective": objective,
        "learning_rate": learning_rate,
        "batch_tokens": batch_tokens,
        "context": context,
        "seed": seed,
    }
    (stage,) = load_recipe({"heal": [{key: value for key, value in given.items() if value is not None}]}).heal
    found = heal(
        model,
        out,
        data,
        stage,
        teacher=teacher,
        device=device,
        overwrite=overwrite,
        restart=restart,
        command=options.command_line(),
    )
    if json:
        print_json(vars(found))
    note(f"written: {out}")
