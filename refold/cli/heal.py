"""`refold heal`: training of a folded model, or of any model."""

from refold.cli import options
from refold.cli.show import note, print_json


def command(
    model: options.Model,
    out: options.Out,
    data: options.TrainingDataOption,
    field: options.FieldOption = None,
    tokens: options.HealTokens = None,
    protocol: options.Protocol = None,
    recipe: options.HealRecipe = None,
    set_: options.HealSet = None,
    held_out: options.HeldOutOption = None,
    teacher: options.TeacherOption = None,
    sweep: options.Sweep = None,
    dry_run: options.DryRun = False,
    sharded: options.Sharded = False,
    report_to: options.ReportTo = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    restart: options.Restart = False,
    json: options.Json = False,
) -> None:
    """Train a folded model, or any model, stage by stage. After an interruption the same command resumes."""
    from refold.data.corpus import describe_training
    from refold.healing.heal import heal
    from refold.healing.probe import probe
    from refold.healing.run import HealOptions
    from refold.healing.sweep import read_sweep
    from refold.healing.team import is_first_process
    from refold.recipe.stages import choose_stages

    stages = choose_stages(protocol=protocol, recipe=recipe, tokens=tokens, overrides=set_ or ())
    texts, measured = options.locate_data(data, field) or [], options.locate_data(held_out, field)
    how = HealOptions(
        device=device,
        overwrite=overwrite,
        restart=restart,
        sweep=read_sweep(sweep),
        sharded=sharded,
        report_to=tuple(report_to or ()),
        command=options.command_line(),
    )
    if is_first_process():
        for line in describe_training(texts, stages[0].data):
            note(line)
    if dry_run:
        found = probe(model, texts, stages, held_out=measured, teacher=teacher, device=device, quiet=True)
    else:
        found = heal(model, out, texts, stages, held_out=measured, teacher=teacher, options=how)
    if is_first_process():
        print_json(found.figures) if json else print(found.line)
        note("dry run: nothing is written" if dry_run else f"written: {out}")
