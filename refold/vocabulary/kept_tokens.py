"""The tokens that a model keeps of its source's vocabulary, and their file in the model folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from refold.checkpoint.companions import KEPT_TOKENS_NAME
from refold.checkpoint.source_file import parse_object, read_file
from refold.errors import FolderError

FORMAT = 1
"""Version of the format of `kept_tokens.json`."""


@dataclass(frozen=True)
class KeptTokens:
    """The kept tokens of a vocabulary: token i of the cut vocabulary is token `ids[i]` of the source.

    Attributes:
        ids: Ids of the source, ascending, so that the order of tokens stays.
        source_size: Rows of the source's embedding.
    """

    ids: Int64[np.ndarray, " kept"]
    source_size: int

    def __post_init__(self) -> None:
        assert len(self.ids) > 0
        assert (np.diff(self.ids) > 0).all(), "ids: ascending"
        assert self.ids[0] >= 0
        assert self.ids[-1] < self.source_size

    @property
    def size(self) -> int:
        """Number of kept tokens."""
        return len(self.ids)

    @property
    def numbers(self) -> dict[int, int]:
        """The new id of each kept token, by its id in the source."""
        return {int(source): number for number, source in enumerate(self.ids)}

    def to_source(self, input_ids: Int64[Tensor, "*M"]) -> Int64[Tensor, "*M"]:
        """Returns the source's ids of tokens of the cut vocabulary."""
        return torch.from_numpy(self.ids).to(input_ids.device)[input_ids]

    def from_source(self, input_ids: Int64[Tensor, "*M"]) -> Int64[Tensor, "*M"]:
        """Returns the ids in the cut vocabulary of tokens of the source; -1 for a dropped token."""
        numbers = torch.full((self.source_size,), -1, dtype=torch.int64, device=input_ids.device)
        numbers[torch.from_numpy(self.ids).to(input_ids.device)] = torch.arange(self.size, device=input_ids.device)
        return numbers[input_ids]

    def is_cut_of(self, cut: Mapping[str, int], source: Mapping[str, int]) -> bool:
        """Tells whether each token of a cut tokenizer is the token of the source that the ids say.

        Args:
            cut: Id of each token of the cut tokenizer.
            source: Id of each token of the source's tokenizer.
        """
        return all(number < self.size and source.get(token) == self.ids[number] for token, number in cut.items())

    def write(self, folder: Path) -> None:
        """Writes `kept_tokens.json`."""
        content = {"format": FORMAT, "source_size": self.source_size, "ids": self.ids.tolist()}
        (folder / KEPT_TOKENS_NAME).write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_kept_tokens(folder: Path) -> KeptTokens | None:
    """Reads `kept_tokens.json` of a model folder; None if the folder has none.

    Raises:
        FolderError: The file is damaged.
    """
    path = folder / KEPT_TOKENS_NAME
    if not path.is_file():
        return None
    found = parse_object(read_file(path), str(path), "convert again")
    return parse_kept_tokens(found, str(path))


def parse_kept_tokens(found: Mapping[str, object], where: str) -> KeptTokens:
    """Returns the tokens of a parsed `kept_tokens.json`.

    Raises:
        FolderError: The content is of another form.
    """
    ids, size = found.get("ids"), found.get("source_size")
    is_whole = found.get("format") == FORMAT and type(size) is int and isinstance(ids, list) and len(ids) > 0
    if is_whole and all(type(each) is int for each in ids):  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
        made = np.array(ids, dtype=np.int64)
        if (np.diff(made) > 0).all() and made[0] >= 0 and made[-1] < size:  # pyright: ignore[reportOperatorIssue]
            return KeptTokens(made, size)  # pyright: ignore[reportArgumentType]
    raise FolderError(
        f"{where}: a list of kept tokens of format {FORMAT} is required (`ids` ascending and below `source_size`); "
        f"convert again"
    )
