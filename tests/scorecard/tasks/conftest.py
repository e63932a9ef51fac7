import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = ("sea", "moon", "night", "café", "best", "worst", "times", "age", "wisdom", "dear", "calm", "return", "def")


@pytest.fixture(scope="session")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with made items for some of refold's tasks: 40 each, with the right answer at every place."""
    folder, generator = tmp_path_factory.mktemp("items"), random.Random(2)

    def text(least: int, most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(least, most)))

    def question(index: int) -> dict[str, Any]:
        return {"query": text(3, 20), "choices": [text(1, 4) + f" {place}" for place in range(4)], "gold": index % 4}

    write(folder / "arc_easy.jsonl", [question(index) for index in range(40)])
    write(folder / "hellaswag.jsonl", [question(index) for index in range(40)])
    pairs = [[text(4, 8) + " a", text(4, 8) + " b"] for _ in range(40)]
    write(
        folder / "winogrande.jsonl",
        [{"context_options": each, "continuation": text(2, 4), "gold": index % 2} for index, each in enumerate(pairs)],
    )
    write(folder / "lambada_openai.jsonl", [{"context": text(5, 9), "continuation": text(1, 1)} for _ in range(40)])
    write(folder / "adjunct_island.jsonl", [{"sentence_good": a, "sentence_bad": b, "UID": 1} for a, b in pairs])
    return folder


def write(path: Path, items: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


@pytest.fixture
def write_items() -> Callable[[Path, list[dict[str, Any]]], None]:
    return write
