"""`refold run`: conversion, healing and evaluation in one run, with baselines."""

from pathlib import Path
from typing import Annotated

import typer

from refold.cli import options
from refold.cli.show import note, print_json, progress


def command(
    source: options.SourceOption,
    out: Annotated[Path, typer.Argument(help="Run folder. After an interruption the same command resumes.")],
    data: options.TrainingDataOption,
    field: options.FieldOption = None,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Built-in name or YAML file.")] = "lowrank",
    set_: options.Set = None,
    tokens: options.HealTokens = None,
    held_out: options.HeldOutOption = None,
    baseline: options.Baselines = None,
    eval_tokens: options.EvalTokens = None,
    dry_run: options.DryRun = False,
    device: options.Device = None,
    allow_larger: options.AllowLarger = False,
    json: options.Json = False,
) -> None:
    """Plan, convert, heal and evaluate, and compare with a depth-pruned model and the quantised source."""
    from refold.progress import Show
    from refold.studies.baselines import read_baselines
    from refold.studies.forecast import forecast
    from refold.studies.job import RunOptions, RunSettings, read_job
    from refold.studies.run import run

    texts, measured = options.locate_data(data, field) or (), options.locate_data(held_out, field)
    settings = RunSettings(tokens, read_baselines(baseline), eval_tokens, device)
    how = RunOptions(set_ or (), allow_larger, options.command_line(), Show(note, progress))
    if dry_run:
        found = forecast(read_job(source, recipe, texts, measured, settings, how))
        print_json(vars(found)) if json else print(found.line)
        return
    made = run(source, out, recipe, texts, held_out=measured, settings=settings, options=how)
    note(f"model: {made.model}\nfigures: {out / 'summary.json'}\npage: {out / 'report.html'}")
    print_json({"line": made.line, "model": str(made.model)}) if json else print(made.line)
