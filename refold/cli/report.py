"""`refold report`: one page about finished runs, fits, models and scorecards."""

from pathlib import Path
from typing import Annotated

import typer

from refold.cli import options
from refold.cli.show import note, progress


def command(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Folders of `refold run`, `fit` and `analyse`, model folders, files or folder of `refold evaluate`.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="HTML file; pictures go into a folder of its name beside it.")],
    overwrite: options.Overwrite = False,
) -> None:
    """Write one page about runs: stack, size and loss, healing, exits, recall, memory, transfer, provenance."""
    from refold.fitting.finished import FIT_FOLDER
    from refold.report.opening import open_runs
    from refold.report.page import pictures_folder, require_free_report, write_report
    from refold.studies.finished import RUN_FOLDER

    require_free_report(out, overwrite)
    opened = open_runs(runs, (RUN_FOLDER, FIT_FOLDER))
    with progress("drawing", "pictures") as report:
        made = write_report(opened, out, overwrite=overwrite, progress=report)
    note(f"pictures: {pictures_folder(made)}")
    print(made)
