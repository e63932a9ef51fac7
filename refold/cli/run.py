"""`refold run`: the whole way in one go."""

from pathlib import Path
from typing import Annotated

import typer

from refold.cli import options
from refold.cli.show import note, print_json


def command(
    source: options.SourceOption,
    out: Annotated[Path, typer.Argument(help="Run folder. The same command again goes on where it was interrupted.")],
    data: options.TrainingDataOption,
    field: options.FieldOption = None,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Built-in name or YAML file.")] = "relaxed",
    set_: options.Set = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", "-t", help="Healing tokens, such as 20M; 0: none. Left out: the recipe's.")
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="Text to evaluate on. Left out: a fiftieth of --data is kept for that.")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="pruned, lowrank, quantised, trained-source, scratch or none; repeatable."),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate, over the recipe's.")] = None,
    eval_tokens: Annotated[str, typer.Option(help="Held-out tokens to read.")] = "200k",
    seed: Annotated[
        int | None, typer.Option(help="Seed of the order of the data. Left out: the recipe's, else 0.")
    ] = None,
    device: options.Device = None,
    allow_larger: options.AllowLarger = False,
    json: options.Json = False,
) -> None:
    """Plan, convert, heal and evaluate, beside a depth-pruned model of the same size and the source quantised."""
    from refold.studies.baselines import read_baselines
    from refold.studies.run import RunSettings, run

    settings = RunSettings(
        tokens=options.parse_amount(tokens),
        baselines=read_baselines(baseline),
        eval_tokens=options.parse_amount(eval_tokens),
        learning_rate=learning_rate,
        seed=seed,
        device=device,
    )
    found = run(
        source,
        out,
        recipe,
        options.locate_data(data, field) or (),
        set_ or (),
        held_out=options.locate_data(held_out, field),
        settings=settings,
        allow_larger=allow_larger,
        command=options.command_line(),
        say=note,
    )
    note(f"model: {found.model}\nfigures: {out / 'summary.json'}")
    if json:
        print_json({"line": found.line, "model": str(found.model)})
    else:
        print(found.line)
