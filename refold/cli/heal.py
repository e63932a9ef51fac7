"""`refold heal`: train what a fold broke."""

from typing import Annotated, Any

import typer

from refold.cli import options
from refold.cli.show import note, print_json


def command(
    model: options.Model,
    out: options.Out,
    data: options.TrainingDataOption,
    field: options.FieldOption = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", "-t", help="Training tokens of all stages, such as 20M.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", "-p", help="A built-in protocol (`refold recipes --protocols`).")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Built-in recipe or YAML file whose `heal` section says how.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One key: `heal.warmup=0.1`, in a recipe `heal.0.warmup`."),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="What all stages minimise instead: distil, next_token, hidden_states, ...")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate of all stages.")] = None,
    batch_tokens: Annotated[str | None, typer.Option(help="Tokens for each optimizer step.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in one packed sequence.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the order of the data. Left out: the recipe's, else 0.")
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="Text that is measured at intervals and not trained on. Repeatable.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder or hub id. Left out: what MODEL was folded from.")] = None,
    teacher_tokens: Annotated[
        str | None, typer.Option(help="Train the teacher on the same data for so many tokens first.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="lr", help="`lr`: try a third, one and three times the learning rate first.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run ten steps, tell hours, memory and disk, and write nothing.")
    ] = False,
    sharded: Annotated[
        bool, typer.Option("--sharded", help="Under torchrun: spread the weights over the processes (FSDP2).")
    ] = False,
    report_to: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb or trackio, where installed. Repeatable.")
    ] = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew instead of resuming.")] = False,
    json: options.Json = False,
) -> None:
    """Train a folded model, or any model, stage by stage. Interrupted, the same command goes on where it was."""
    from refold.data.corpus import describe_training
    from refold.errors import HealError
    from refold.healing.heal import heal
    from refold.healing.probe import probe
    from refold.healing.run import HealOptions
    from refold.healing.team import is_first_process
    from refold.recipe.stages import choose_stages

    changes: dict[str, Any] = {
        "objective": objective,
        "learning_rate": learning_rate,
        "batch_tokens": batch_tokens,
        "context": context,
        "teacher_tokens": teacher_tokens,
        "seed": seed,
    }
    stages = choose_stages(
        protocol=protocol,
        recipe=recipe,
        tokens=options.parse_amount(tokens),
        changes={key: value for key, value in changes.items() if value is not None},
        overrides=set_ or (),
    )
    texts, measured = options.locate_data(data, field) or [], options.locate_data(held_out, field)
    if sweep not in (None, "lr"):
        raise HealError(f"--sweep: lr is required (got '{sweep}')")
    if dry_run:
        estimate = probe(model, texts, stages, held_out=measured, teacher=teacher, device=device, quiet=True)
        print_json({**vars(estimate), "line": estimate.line}) if json else print(estimate.line)
        return
    if is_first_process():
        for line in describe_training(texts, stages[0].data if stages else "text"):
            note(line)
    found = heal(
        model,
        out,
        texts,
        stages,
        held_out=measured,
        teacher=teacher,
        device=device,
        overwrite=overwrite,
        restart=restart,
        options=HealOptions(
            sweep=sweep is not None, sharded=sharded, report_to=tuple(report_to or ()), command=options.command_line()
        ),
    )
    if not is_first_process():
        return
    if json:
        print_json(vars(found))
    else:
        print(found.line)
    note(f"written: {out}")
