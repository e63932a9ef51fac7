"""`refold fit`: the cheapest model for a budget, or the best models for several."""

from refold.cli import fit_options as fits
from refold.cli.options import command_line, locate_data
from refold.cli.show import note, print_json, progress


def command(
    source: fits.FitSource = None,
    out: fits.FitOut = None,
    bytes_: fits.BytesLimit = None,
    cache: fits.CacheLimit = None,
    flops: fits.FlopsLimit = None,
    latency: fits.LatencyLimit = None,
    on: fits.On = None,
    context: fits.FitContext = None,
    max_loss: fits.MaxLoss = None,
    smallest: fits.Smallest = None,
    sweep: fits.SweepBudgets = None,
    for_: fits.ForEngine = None,
    without: fits.Without = None,
    trim_vocabulary: fits.TrimVocabulary = False,
    looks: fits.Looks = None,
    no_singles: fits.NoSingles = False,
    tokens: fits.HealFor = None,
    data: fits.FitData = None,
    held_out: fits.FitHeldOut = None,
    field: fits.FitField = None,
    calibration_tokens: fits.MeasuredTokens = None,
    eval_tokens: fits.ScoredTokens = None,
    measure_device: fits.MeasureDevice = None,
    dry_run: fits.FitDryRun = False,
    seed: fits.FitSeed = None,
    device: fits.FitDevice = None,
    overwrite: fits.FitOverwrite = False,
    json: fits.FitJson = False,
) -> None:
    """Find the best model within a budget: measure SOURCE once, choose bits, ranks, widths and parts, convert.

    Percentages count SOURCE at two bytes a number, whatever it is stored in.
    """
    # Every option that was given, before any other local variable exists.
    given = {name: value for name, value in locals().items() if not (value is None or value is False or value == [])}

    from refold.cli import fit_tables
    from refold.fitting.budget import DEFAULT_CONTEXT
    from refold.fitting.options import FitOptions, check_request, read_budgets
    from refold.progress import Show

    check_request(given)
    if measure_device is not None:
        fit_tables.measure_device(measure_device, source, device, overwrite)
        return
    limits = {"bytes": bytes_, "cache": cache, "flops": flops, "latency": latency, "max_loss": max_loss}
    budgets = read_budgets(limits, DEFAULT_CONTEXT if context is None else context, sweep)
    chosen = {
        "tokens": tokens,
        "calibration_tokens": calibration_tokens,
        "eval_tokens": eval_tokens,
        "looks": looks,
        "smallest": smallest,
        "seed": seed,
    }
    how = FitOptions(
        **{name: value for name, value in chosen.items() if value is not None},
        engine=for_,
        device_table=on,
        singles=not no_singles,
        without=tuple(name.strip() for name in (without or "").split(",") if name.strip()),
        trim_vocabulary=trim_vocabulary,
        overwrite=overwrite,
        device=device,
        dry_run=dry_run,
        command=command_line(),
        show=Show(note, progress),
    )
    from refold.fitting import fit as fitting

    texts, measured = locate_data(data, field), locate_data(held_out, field)
    assert source is not None, "check_request refuses this"
    assert out is not None
    assert texts is not None
    if sweep is None:
        found = fitting.fit(source, out, budgets[0], how, data=texts, held_out=measured)
    else:
        found = fitting.sweep(source, out, budgets, how, data=texts, held_out=measured)
    print_json(found) if json else fit_tables.print_fit(found)
    note("dry run: nothing is written" if dry_run else f"written: {out}")
