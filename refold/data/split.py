"""Split of text into training text and held-out text, for users who name no held-out text."""

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from refold.data.blocks import Block
from refold.data.field import Document
from refold.data.mixture import MixedSource
from refold.data.readers import DataSource
from refold.errors import DataError

EVERY = 50
SIDES = ("training", "held-out")
PIECE = 8_000
"""Characters of a piece; long documents are cut into pieces, so that a single long text can be split too."""


@dataclass(frozen=True)
class HalfBlock(Block[Document]):
    """The pieces of a block's documents on one side of the split."""

    block: Block[Document]
    every: int
    held_out: bool
    divisor: int = 1

    def documents(self) -> Sequence[Document]:
        return [piece for part in self.parts() for piece in part]

    def parts(self) -> Iterator[Sequence[Document]]:
        for part in self.block.parts():
            pieces = (piece for document in part for piece in _pieces(document))
            # The content decides, so the side does not depend on the order of files, and equal pieces are on one side.
            yield [piece for piece in pieces if self._is_held_out(piece) == self.held_out]

    def _is_held_out(self, piece: Document) -> bool:
        return zlib.crc32(_content(piece)) // self.divisor % self.every == 0


def _pieces(document: Document) -> Iterable[Document]:
    return cut(document) if isinstance(document, str) else [document]


def _content(piece: Document) -> bytes:
    return piece.encode() if isinstance(piece, str) else json.dumps(piece.messages, sort_keys=True).encode()


def cut(text: str, size: int = PIECE) -> Iterator[str]:
    """Yields a text in pieces of about `size` characters, cut after a line end if there is one."""
    start = 0
    while len(text) - start > 2 * size:
        stop = text.rfind("\n", start + size // 2, start + size) + 1 or start + size
        yield text[start:stop]
        start = stop
    yield text[start:]


def split(source: DataSource, every: int = EVERY) -> tuple[DataSource, DataSource]:
    """Splits documents into training text and held-out text; each part of a mixture is split separately.

    Args:
        source: The documents.
        every: Pieces per held-out piece. The number is halved as long as a side has no piece.

    Raises:
        DataError: The text is too short to be split.
    """
    if isinstance(source, MixedSource) and source.weights is not None:
        pairs = [split(part, every) for part in source.parts]
        held_out = [pair[1] for pair in pairs]
        train = MixedSource.weighted([pair[0] for pair in pairs], source.weights)
        return train, MixedSource.of_whole(DataSource.join(held_out), held_out)
    while every >= 2:
        train, held_out = (_side(source, every, held_out) for held_out in (False, True))
        if all(next(each.documents(), None) is not None for each in (train, held_out)):
            return train, held_out
        every //= 2
    raise DataError(f"{source.name}: more text is required to hold some out (got too little); name held-out text")


def whole_name(name: str) -> str:
    """Returns the name of the text that a side of a split is from; other names as they are."""
    for side in SIDES:
        name = name.removesuffix(f" ({side} part)")
    return name


def halve(source: DataSource) -> tuple[DataSource, DataSource]:
    """Splits a held-out text again into two halves, by other digits of the checksum of each piece than `split`.

    Raises:
        DataError: A half has no text.
    """
    found = _side(source, 2, False, divisor=EVERY), _side(source, 2, True, divisor=EVERY)
    if any(next(each.documents(), None) is None for each in found):
        raise DataError(f"{source.name}: more text is required for two halves (got too little); name held-out text")
    return found


def split_in_three(source: DataSource, every: int = EVERY) -> tuple[DataSource, DataSource, DataSource]:
    """Splits documents into training text and two halves of held-out text; of short text more is held out.

    Args:
        source: The documents.
        every: Pieces per held-out piece. The number is halved as long as a half has no piece.

    Raises:
        DataError: The text is too short to be split.
    """
    while True:
        train, held_out = split(source, every)
        try:
            return train, *halve(held_out)
        except DataError:
            if every < 4:
                raise
            every //= 2


def _side(source: DataSource, every: int, held_out: bool, divisor: int = 1) -> DataSource:
    blocks = tuple(HalfBlock(block, every, held_out, divisor) for block in source.blocks)
    side = SIDES[held_out]
    halved = "" if divisor == 1 else f" after {divisor}"
    name = f"{whole_name(source.name)} ({side if divisor == 1 else SIDES[1]} part)"
    whole = DataSource(blocks, f"{source.identity} {side} 1/{every}{halved}", name)
    if not isinstance(source, MixedSource):
        return whole
    parts = [_side(part, every, held_out, divisor) for part in source.parts]
    return MixedSource.of_whole(whole, [part for part in parts if next(part.documents(), None) is not None])
