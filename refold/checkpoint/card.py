"""The model card of a folder that refold writes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from refold.checkpoint.source_file import read_file
from refold.errors import SourceError

CARD_NAME = "README.md"
STOCK_USAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")"""
FOLDED_USAGE = f"import refold\n{STOCK_USAGE}"
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def read_licence(folder: Path) -> str | None:
    """Returns the `license:` of a model card; None if it names none."""
    try:
        front = _FRONT.match(read_file(folder / CARD_NAME).decode("utf-8"))
    except (SourceError, UnicodeDecodeError):
        return None
    found = re.search(r"^license:\s*(\S+)\s*$", front.group(1), re.MULTILINE) if front else None
    return found.group(1) if found else None


def write_card(
    folder: Path,
    base_model: str,
    title: str,
    facts: Mapping[str, str],
    notes: Sequence[str] = (),
    licence: str | None = None,
    usage: str = FOLDED_USAGE,
) -> None:
    """Writes `README.md` with the front matter that the hub reads.

    Args:
        folder: An unfinished model folder.
        base_model: Hub id or folder name of the source.
        title: The card's heading.
        facts: Rows of the table: value by quantity.
        notes: Sentences under the table.
        licence: The source's licence; None if its card names none.
        usage: Python code that loads the folder.
    """
    front = ["---", f"base_model: {base_model}", "library_name: transformers", "tags: [refold]"]
    front += [f"license: {licence}"] if licence else []
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    body = [f"# {title}", "", "| | |", "|---|---|", *rows, "", *(f"- {note}" for note in notes), ""]
    body += ["```python", usage, "```"]
    text = "\n".join([*front, "---", "", *body]) + "\n"
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
