"""Amounts of the sections of a scorecard that are made on the spot: lengths, items, documents, repeats."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

from refold.errors import RefoldError
from refold.fields import read_amount
from refold.suggest import must_be_one_of, shorten

_WHOLE = ("recall_items", "documents", "exit_documents", "opening", "branch_layers", "prompt_tokens", "repeats")
SECTIONS = {
    "recall_lengths": ("recall",),
    "recall_items": ("recall",),
    "needle_depths": ("recall",),
    "documents": ("branches", "noise", "recall"),
    "exit_documents": ("exits",),
    "opening": ("exits", "branches", "noise"),
    "exit_tolerances": ("exits",),
    "branch_layers": ("branches",),
    "noise_shares": ("noise",),
    "prompt_tokens": ("speed",),
    "new_tokens": ("speed",),
    "batches": ("speed",),
    "repeats": ("speed",),
}
"""The sections that read each amount."""


@dataclass(frozen=True)
class ScoreAmounts:
    """Amounts of recall, exits, branches, noise and speed.

    The defaults measure each section of a model of 135 million parameters in about a minute on two CPU cores.

    Attributes:
        recall_lengths: Tokens of the contexts of recall; those beyond the model's positions are skipped.
        recall_items: Items of each kind, length and depth of the needle.
        needle_depths: Places of the passkey in its context, 0 the start and 1 the end.
        documents: Documents of the text for branches, noise and verbatim continuation.
        exit_documents: Documents of the text for exits; half of them choose thresholds.
        opening: First tokens of each document that are read.
        exit_tolerances: Shares of differing tokens for which thresholds are chosen.
        branch_layers: Most layers whose branch is turned off alone.
        noise_shares: Shares of changed letters or words.
        prompt_tokens: Tokens of the prompts of speed.
        new_tokens: New tokens of each prompt.
        batches: Numbers of prompts that run at once; one prompt always runs.
        repeats: Runs of each model and number of prompts; the medians are reported.

    Raises:
        RefoldError: An amount is out of range.
    """

    recall_lengths: tuple[int, ...] = (128, 256, 512, 1024)
    recall_items: int = 8
    needle_depths: tuple[float, ...] = (0.0, 0.5, 1.0)
    documents: int = 16
    exit_documents: int = 64
    opening: int = 256
    exit_tolerances: tuple[float, ...] = (0.01, 0.05)
    branch_layers: int = 16
    noise_shares: tuple[float, ...] = (0.02, 0.05, 0.1)
    prompt_tokens: int = 64
    new_tokens: int = 32
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 3

    def __post_init__(self) -> None:
        for name in _WHOLE:
            self._require(name, getattr(self, name), 1)
        # Tokens after the first are timed, and a context holds a pair, its question and a start.
        self._require("new_tokens", self.new_tokens, 2)
        for length in self.recall_lengths:
            self._require("recall_lengths", length, 16)
        for rows in self.batches:
            self._require("batches", rows, 1)
        for name in ("needle_depths", "exit_tolerances", "noise_shares"):
            for share in getattr(self, name):
                if not 0 <= share <= 1:
                    raise RefoldError(f"{name}: must lie between 0 and 1 (got {share:g})")

    def _require(self, name: str, value: int, least: int) -> None:
        if value < least:
            raise RefoldError(f"{name}: at least {least} is required (got {value})")


def read_amounts(given: Sequence[str], sections: Collection[str]) -> ScoreAmounts:
    """Reads amounts that are written as `NAME=VALUE`, several values with commas: `recall_lengths=512,4k`.

    Args:
        given: The amounts; the others keep their defaults.
        sections: The sections that are measured.

    Raises:
        RefoldError: An amount is unknown, given twice, no number or out of range, or no section that is measured reads
            it.
    """
    read: dict[str, Any] = {}
    defaults = {each.name: each.default for each in fields(ScoreAmounts)}
    for pair in given:
        name, sign, text = (part.strip() for part in pair.partition("="))
        if name not in defaults:
            raise RefoldError(f"amount: {must_be_one_of(name, defaults)}")
        if not sign or name in read:
            raise RefoldError(f"{name}: one {name}=VALUE is required (got {shorten(pair)}{' again' if sign else ''})")
        if not any(section in sections for section in SECTIONS[name]):
            wanted = " or ".join(f"--{section}" for section in SECTIONS[name])
            raise RefoldError(f"{name}: {wanted} is required with it")
        default = defaults[name]
        if isinstance(default, tuple):
            read[name] = tuple(_read_number(name, each, type(default[0])) for each in text.split(","))
        else:
            read[name] = _read_number(name, text, type(default))
    return ScoreAmounts(**read)


def _read_number(name: str, text: str, kind: type) -> int | float:
    try:
        return read_amount(text) if kind is int else float(text)
    except ValueError as error:
        problem = str(error) if kind is int else f"must be a number such as 0.5 (got {shorten(text)})"
        raise RefoldError(f"{name}: {problem}") from None
