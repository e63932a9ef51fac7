"""`tokenizer.json` as data: its tokens, the tokens that encoding needs, and the file cut to some tokens."""

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from refold.checkpoint.companions import offers_tokenizer
from refold.checkpoint.source_file import parse_object, read_file
from refold.errors import SourceError
from refold.vocabulary.merge_paths import MergePaths, read_merges

NAME = "tokenizer.json"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's character for a space. Its bytes would decode to this character instead of a space."""
_BYTES = [f"<0x{value:02X}>" for value in range(256)]


def _byte_characters() -> set[str]:
    """Returns the 256 characters that byte-level vocabularies write bytes as (GPT-2): printable ones are themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return {chr(value) for value in printable} | {chr(0x100 + number) for number in range(256 - len(printable))}


class TokenModel(ABC):
    """The model of a tokenizer: BPE or Unigram.

    Args:
        raw: The object `model` of `tokenizer.json`.

    Attributes:
        ids: Id of each token.
    """

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw
        self.ids: dict[str, int] = self._read_ids()

    @abstractmethod
    def _read_ids(self) -> dict[str, int]: ...

    @property
    @abstractmethod
    def unknown(self) -> str | None:
        """The token of text that has no other token."""

    def required(self, is_byte_level: bool) -> set[str]:
        """Returns the tokens without which some texts could not be encoded or decoded."""
        found = {self.unknown} if self.unknown is not None else set()
        if is_byte_level:
            return found | (_byte_characters() & self.ids.keys())
        if self.raw.get("byte_fallback") and all(token in self.ids for token in _BYTES):
            return found | {*_BYTES, SPACE} & self.ids.keys()
        return found | {token for token in self.ids if len(token) == 1}

    @abstractmethod
    def closure(self, tokens: Collection[str]) -> set[str]:
        """Returns tokens of the model together with those that encoding passes through on its way to them."""

    @abstractmethod
    def cut(self, numbers: Mapping[int, int]) -> dict[str, Any]:
        """Returns the object `model` with only the tokens of `numbers`, which gives the new id by id."""


class PairMerges(TokenModel):
    """Byte-pair encoding, byte-level or with characters and perhaps byte fallback."""

    def _read_ids(self) -> dict[str, int]:
        return dict(self.raw["vocab"])

    @property
    def unknown(self) -> str | None:
        return self.raw.get("unk_token")

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs, best first."""
        return read_merges(self.raw)

    @cached_property
    def _paths(self) -> MergePaths:
        return MergePaths(self.merges)

    def closure(self, tokens: Collection[str]) -> set[str]:
        found = set(tokens)
        for token in tokens:
            found |= self._paths.path(token) & self.ids.keys()
        return found

    def cut(self, numbers: Mapping[int, int]) -> dict[str, Any]:
        kept = {token: numbers[each] for token, each in self.ids.items() if each in numbers}
        merges = [
            written
            for written, (left, right) in zip(self.raw["merges"], self.merges, strict=True)
            if left in kept and right in kept and left + right in kept
        ]
        return {**self.raw, "vocab": dict(sorted(kept.items(), key=lambda each: each[1])), "merges": merges}


class Pieces(TokenModel):
    """Unigram: the pieces with the largest sum of log-probabilities (Kudo, arXiv 1804.10959).

    The best segmentation of a text stays the best one when other pieces are dropped. So no further piece is needed,
    except one of the lowest score, from which the score of unknown text follows.
    """

    def _read_ids(self) -> dict[str, int]:
        return {piece: number for number, (piece, _) in enumerate(self.raw["vocab"])}

    @property
    def unknown(self) -> str | None:
        number = self.raw.get("unk_id")
        return None if number is None else self.raw["vocab"][number][0]

    def required(self, is_byte_level: bool) -> set[str]:
        worst, _ = min(self.raw["vocab"], key=lambda each: each[1])
        return super().required(is_byte_level) | {worst}

    def closure(self, tokens: Collection[str]) -> set[str]:
        return set(tokens)

    def cut(self, numbers: Mapping[int, int]) -> dict[str, Any]:
        vocab = [piece for number, piece in enumerate(self.raw["vocab"]) if number in numbers]
        unknown = self.raw.get("unk_id")
        return {**self.raw, "vocab": vocab, "unk_id": None if unknown is None else numbers[unknown]}


_MODELS: dict[str, type[TokenModel]] = {"BPE": PairMerges, "Unigram": Pieces}


class TokenizerFile:
    """The content of `tokenizer.json`.

    Args:
        raw: Its object.
        where: Its path, for messages.

    Attributes:
        model: The model.
        added: Id of each added token, by its text.
        ids: Id of each token, added or not.
    """

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw, self.where = raw, where
        self.model = _read_model(raw, where)
        self.added: dict[str, int] = {each["content"]: each["id"] for each in raw.get("added_tokens") or []}
        self.ids: dict[str, int] = {**self.model.ids, **self.added}

    @cached_property
    def names(self) -> dict[int, str]:
        """Token by id."""
        return {number: token for token, number in self.ids.items()}

    def required(self) -> set[int]:
        """Returns the ids without which some texts could not be encoded, and those that the post-processor adds."""
        is_byte_level = any(each.get("type") == "ByteLevel" for each in self._steps())
        found = {self.ids[token] for token in self.model.required(is_byte_level) if token in self.ids}
        return found | {number for step in self._steps("post_processor") for number in _processor_ids(step)}

    def closure(self, ids: Collection[int]) -> set[int]:
        """Returns ids together with those of all tokens on their merge paths."""
        tokens = {self.names[each] for each in ids if each in self.names}
        of_model = {token for token in tokens if token in self.model.ids}
        return {*ids, *(self.model.ids[token] for token in self.model.closure(of_model))}

    def cut(self, numbers: Mapping[int, int]) -> dict[str, Any]:
        """Returns the content of the file with only some tokens.

        Args:
            numbers: New id of each kept token, by its id.
        """
        added = [{**each, "id": numbers[each["id"]]} for each in self.raw.get("added_tokens") or []
                 if each["id"] in numbers]  # fmt: skip
        found = {**self.raw, "added_tokens": added, "model": self.model.cut(numbers)}
        found["post_processor"] = copy.deepcopy(self.raw.get("post_processor"))
        for step in _flat(found["post_processor"]):
            _renumber_processor(step, numbers)
        padding = self.raw.get("padding")
        if padding is not None:
            found["padding"] = {**padding, "pad_id": numbers.get(padding.get("pad_id"), 0)}
        return found

    def _steps(self, *names: str) -> Iterator[Mapping[str, Any]]:
        for name in names or ("normalizer", "pre_tokenizer"):
            yield from _flat(self.raw.get(name))


def read_tokenizer_file(folder: Path) -> TokenizerFile:
    """Reads `tokenizer.json` of a model's companions.

    Raises:
        SourceError: The file is missing or damaged, or the tokenizer is of a kind whose vocabulary cannot be cut.
    """
    path = folder / NAME
    if not path.is_file():
        got = "a slow tokenizer" if offers_tokenizer(folder) else "no tokenizer"
        raise SourceError(
            f"vocabulary: a source with {NAME} is required (got {got} in {folder}); load the tokenizer by transformers "
            f"and save it, or remove `vocabulary`"
        )
    return TokenizerFile(parse_object(read_file(path), str(path), "take an undamaged copy"), str(path))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file as transformers does."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _read_model(raw: Mapping[str, Any], where: str) -> TokenModel:
    model = raw.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind not in _MODELS:
        raise SourceError(
            f"vocabulary: a tokenizer of type {' or '.join(_MODELS)} is required (got {kind} in {where}); remove "
            f"`vocabulary`"
        )
    marks = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if marks:
        raise SourceError(
            f"vocabulary: a BPE without marks in words is required (got {marks[0]} {model[marks[0]]!r} in {where}); "
            f"remove `vocabulary`"
        )
    return _MODELS[kind](model)


def _flat(step: Any) -> Iterator[dict[str, Any]]:
    """Yields a step of `tokenizer.json`, or the steps of a sequence."""
    if not isinstance(step, dict):
        return
    inner = next((step[name] for name in ("normalizers", "pretokenizers", "processors") if name in step), None)
    if inner is None:
        yield step
        return
    for each in inner:
        yield from _flat(each)


def _processor_ids(step: Mapping[str, Any]) -> Iterator[int]:
    for token in (step.get("special_tokens") or {}).values():
        yield from token["ids"]
    for name in ("sep", "cls"):
        if name in step:
            yield step[name][1]


def _renumber_processor(step: dict[str, Any], numbers: Mapping[int, int]) -> None:
    for token in (step.get("special_tokens") or {}).values():
        token["ids"] = [numbers[each] for each in token["ids"]]
    for name in ("sep", "cls"):
        if name in step:
            step[name] = [step[name][0], numbers[step[name][1]]]
