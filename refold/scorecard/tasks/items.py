"""Items of tasks from local files, and the draw of those that are scored."""

import json
import os
import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from refold.errors import DataError
from refold.suggest import did_you_mean, shorten

FOLDER_VARIABLE = "REFOLD_TASK_DATA"
"""Environment variable with the folder of data, for lm-eval's command line."""
SPLIT = "test"


def read_items(file: str, fields: Sequence[str] = (), task_data: str | None = None, **_: Any) -> DatasetDict:
    """Reads the items of a task, one JSON object a line.

    lm-eval calls this function for task files with `custom_dataset: !function refold.scorecard.tasks.items.read_items`.

    Args:
        file: Name of the file in the folder, or its path.
        fields: Fields that every item must have.
        task_data: The folder; None: that of the environment variable `REFOLD_TASK_DATA`.

    Raises:
        DataError: The folder or the file is missing, holds no items, or an item is broken.
    """
    folder = task_data or os.environ.get(FOLDER_VARIABLE)
    if folder is None:
        raise DataError(
            f"task data: a folder with {file} is required (none given); give --task-data FOLDER, or with lm-eval's "
            f"command line --metadata task_data=FOLDER"
        )
    path = Path(folder) / file
    if not path.is_file():
        there = [each.name for each in sorted(Path(folder).glob("*.jsonl"))] if Path(folder).is_dir() else []
        found = f"{len(there)} other .jsonl files there" if there else "no .jsonl file there"
        raise DataError(f"{path}: a file of items is required ({found}); check the folder{did_you_mean(file, there)}")
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            items.append(_parse(line, fields, f"{path}: line {number}"))
    if not items:
        raise DataError(f"{path}: at least one item is required (got an empty file); take a complete copy")
    return DatasetDict({SPLIT: Dataset.from_list(items)})


def _parse(line: str, fields: Sequence[str], where: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except ValueError:
        raise DataError(f"{where}: a JSON object is required (got {shorten(line)}); mend the line") from None
    if not isinstance(item, dict):
        raise DataError(f"{where}: a JSON object is required (got {shorten(line)}); mend the line")
    for name in fields:
        if name not in item:
            got = ", ".join(map(str, item))
            raise DataError(f"{where}: the field '{name}' is required (got {shorten(got)}); mend the line")
    texts = next((item[name] for name in ("choices", "context_options") if name in fields), None)
    if texts is not None and "gold" in fields:
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(each, str) and each for each in texts):
            raise DataError(f"{where}: at least two texts to choose from are required (got {shorten(texts)})")
        if type(item["gold"]) is not int or not 0 <= item["gold"] < len(texts):
            raise DataError(
                f"{where}: gold must be the place of the right answer, 0 to {len(texts) - 1} "
                f"(got {shorten(item['gold'])})"
            )
    # Other fields may differ from item to item, which a table does not allow.
    return {name: item[name] for name in fields} if fields else item


def draw_order(strata: Sequence[Hashable], seed: int, name: str) -> list[int]:
    """Returns all items in an order whose beginnings are stratified samples.

    Every stratum is shuffled and spread evenly over the order. So a smaller sample is part of a larger one.

    Args:
        strata: Stratum of each item, such as the place of the right answer.
        seed: Seed of the order.
        name: Name of the task, so that tasks of equal size do not draw the same items.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, stratum in enumerate(strata):
        members[stratum].append(index)
    places = []
    for stratum in sorted(members, key=repr):
        generator = random.Random(f"{seed}/{name}/{stratum!r}")
        drawn = members[stratum]
        generator.shuffle(drawn)
        offset = generator.random()
        places += [((rank + offset) / len(drawn), index) for rank, index in enumerate(drawn)]
    return [index for _, index in sorted(places)]
