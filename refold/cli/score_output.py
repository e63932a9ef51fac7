"""Scorecards on their way out: printed one after another, and written to files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from refold.cli.options import command_line
from refold.cli.score_tables import print_scorecard
from refold.cli.show import note, print_json, progress
from refold.errors import FolderError, RefoldError
from refold.progress import Show
from refold.scorecard.names import short_names
from refold.scorecard.record import Scorecard, require_free_scorecard
from refold.scorecard.score import score_each, scores_source
from refold.scorecard.settings import ScoreSettings


class ScoreOutput(NamedTuple):
    """Destinations of scorecards.

    Attributes:
        out: File, or folder of several files; None: none is written.
        overwrite: Whether to replace older scorecards.
        json: Whether to print JSON instead of tables.
    """

    out: Path | None
    overwrite: bool
    json: bool


def print_scores(
    models: Sequence[str], data: Any, settings: ScoreSettings, against: str | None, output: ScoreOutput
) -> None:
    """Measures models, and prints and writes each scorecard as soon as it is done."""
    named = [*models, against] if against is not None and scores_source(models, settings, against) else models
    paths = plan_files(output.out, named, output.overwrite)
    done: list[Scorecard] = []
    try:
        show = Show(note, progress)
        for card in score_each(models, data, settings, against=against, command=command_line(), show=show):
            if not output.json:
                print("\n" * bool(done), end="")
                print_scorecard(card)
            for line in () if card.text is None else card.text.notes:
                note(line)
            done.append(card)
            if paths:
                card.write(paths[len(done) - 1], output.overwrite)
    finally:
        # In JSON one list has all of them, and a disk that is full or a broken model loses none.
        if output.json and done:
            print_json(done[0] if len(named) == 1 else [card.model_dump(mode="json") for card in done])


def plan_files(out: Path | None, models: Sequence[str], overwrite: bool) -> list[Path]:
    """Returns the file of each model's scorecard, after a check that it can be written; none without `out`.

    Raises:
        FolderError: A file exists that must not be replaced, or several scorecards are to be written into one file.
    """
    if out is None:
        return []
    if len(models) == 1:
        return [require_free_scorecard(out, overwrite)]
    if out.suffix == ".json" or (out.exists() and not out.is_dir()):
        raise FolderError(
            f"{out}: a folder is required for the scorecards of {len(models)} models, the source included (got a "
            f"file's name); name a folder"
        )
    names = short_names(models)
    if len(set(names)) < len(names):
        raise RefoldError(f"evaluate: different models are required (got {', '.join(models)}); name each once")
    return [require_free_scorecard(out / f"{name}.json", overwrite) for name in names]
