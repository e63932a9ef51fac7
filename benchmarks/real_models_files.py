"""Files of the figures of `real_models.py`: one for each, and the one that keeps them all beside the page."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from page import run_facts

Row = dict[str, Any]
FOLDERS = ("rows", "healed")


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def keep(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(row, indent=1) + "\n")
    part.replace(path)


def keep_facts(folder: Path, command: str) -> None:
    """Writes the facts of this call, unless an earlier call had the same command line on the same machine."""
    facts = run_facts(0, os.getloadavg()[0])
    earlier = [json.loads(path.read_text()) for path in folder.glob(f"facts-{command}*.json")]
    if any(all(each[name] == facts[name] for name in ("command", "machine")) for each in earlier):
        return
    keep(folder / f"facts-{command}{f'-{len(earlier) + 1}' if earlier else ''}.json", facts)


def read(folder: Path) -> list[Row]:
    """Reads the rows of a folder, in order of size and then of arm."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def read_facts(place: Path) -> list[Row]:
    """Returns the facts of all commands of one model."""
    return [json.loads(path.read_text()) for path in sorted(place.glob("facts-*.json"))]


def most_items(place: Path) -> Path:
    """Returns the folder of the scores of most items; scores of others are of other items, which do not pair."""
    return max(place.glob("tasks-*"), key=lambda path: int(path.name.partition("-")[2]), default=place / "tasks-0")


def pack(places: Sequence[Path], out: Path) -> None:
    """Writes all figures into one file."""
    files = {
        str(path.relative_to(place.parent)): json.loads(path.read_text())
        for place in places
        for path in sorted(place.rglob("*.json"))
        if path.parent in (place, most_items(place)) or path.parent.name in FOLDERS
    }
    out.write_text(json.dumps(files, separators=(",", ":")).replace('},"', '},\n"') + "\n")


def unpack(known: Path, work: Path) -> None:
    """Writes the figures of such a file as the files that the commands make, unless they are there."""
    for name, content in json.loads(known.read_text()).items():
        path = work / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n")
