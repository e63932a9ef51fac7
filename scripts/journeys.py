"""Counts the files of refold in which a function runs, for the journeys a reader of the code takes.

    python scripts/journeys.py

Imports are not counted: only calls made while the journey itself runs, in this process and in its threads.
"""

import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
ROOT = str(CHECKOUT / "refold")
LIMITS = {"plan": 44, "measured convert": 110, "one token": 14}
"""The number of files must be at most this. The goals are 25, 50 and 11; lower a limit when a journey gets shorter."""


def files_run(journey: Callable[[], object]) -> set[str]:
    """Returns the files of refold, relative to the package, in which a function was called during a journey."""
    found: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        # A class body or a module runs once, at import: no part of a journey.
        if event == "call" and name.startswith(ROOT) and frame.f_code.co_name != "<module>":
            found.add(name[len(ROOT) + 1 :])

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        journey()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found


def count_journeys(folder: Path) -> dict[str, set[str]]:
    """Runs each journey twice and counts the second time, so that nothing is counted that only runs at import.

    Args:
        folder: An empty folder.
    """
    import torch

    import refold
    from refold.studies.shipped import shipped_model

    source, text = shipped_model(), folder / "text.txt"
    text.write_text(Path(__file__).read_text() * 20)
    sizes = ["calibration.tokens=2048", "calibration.context=128"]
    made = iter(range(100))

    def convert() -> None:
        refold.convert(source, folder / f"out{next(made)}", "compact", sizes, calibration=[text])

    refold.convert(source, folder / "folded", "relaxed")
    model = refold.load_model(folder / "folded")
    start = model(torch.tensor([[1, 2, 3]]), use_cache=True)

    def token() -> None:
        model(torch.tensor([[4]]), past_key_values=start.past_key_values, use_cache=True)

    journeys = {"plan": lambda: refold.plan(source, "relaxed"), "measured convert": convert, "one token": token}
    found = {}
    for name, journey in journeys.items():
        journey()
        found[name] = files_run(journey)
    return found


def main() -> int:
    # This checkout, whatever is installed.
    sys.path.insert(0, str(CHECKOUT))
    with tempfile.TemporaryDirectory() as folder:
        found = count_journeys(Path(folder))
    for name, files in found.items():
        print(f"{name}: {len(files)} files (at most {LIMITS[name]})")
        for file in sorted(files):
            print(f"  {file}")
    return int(not all(0 < len(files) <= LIMITS[name] for name, files in found.items()))


if __name__ == "__main__":
    sys.exit(main())
