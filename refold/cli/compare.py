"""`refold compare`: scorecards side by side, with paired and tested differences from the first."""

from refold.cli import options
from refold.cli import score_options as scores
from refold.cli.show import print_json


def command(
    files: scores.ComparedFiles,
    out: scores.ComparedOut = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Compare files of `refold evaluate` with the first: every figure, its difference, and whether it is real."""
    from refold.cli.compare_tables import print_comparison, require_free_page, write_page
    from refold.scorecard.compare import compare

    if out is not None:
        require_free_page(out, overwrite)
    found = compare(files)
    print_json(found) if json else print_comparison(found)
    if out is not None:
        write_page(found, out, overwrite)
