"""`refold claims`: the papers' comparisons at matched tokens, each with a verdict."""

from pathlib import Path

from refold.cli import claims_options as own
from refold.cli import options
from refold.cli.show import note, print_json, progress


def command(
    scale: own.ScaleName = "tiny",
    only: own.Only = None,
    source: own.ClaimsSource = None,
    data: own.ClaimsData = None,
    held_out: own.ClaimsHeldOut = None,
    field: options.FieldOption = None,
    work: own.Work = Path("refold-claims"),
    task_data: own.ClaimsTasks = None,
    engine: own.EngineResults = None,
    list_: own.ListClaims = False,
    device: options.Device = None,
    out: own.Page = None,
    overwrite: own.ReplacePage = False,
    json: options.Json = False,
) -> None:
    """Measure the claims of the papers, and say of each whether it is reproduced. The budget is printed first."""
    from refold.claims.study import ClaimsSettings, list_claims, run_and_write
    from refold.cli.claims_tables import print_claims, print_list
    from refold.progress import Show

    if list_:
        print_list(list_claims(scale), json)
        return
    texts, tests = options.locate_data(data, field), options.locate_data(held_out, field)
    settings = ClaimsSettings.of(scale, only, device=device, task_data=task_data, engine=engine)
    how = {"settings": settings, "show": Show(note, progress), "command": options.command_line()}
    found = run_and_write(work, source, texts, tests, page=out, overwrite=overwrite, **how)
    print_json(found) if json else print_claims(found)
