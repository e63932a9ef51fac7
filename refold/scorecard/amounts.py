"""Amounts of the sections of a scorecard that are made on the spot: lengths, items, documents, repeats."""

from dataclasses import dataclass

from refold.errors import RefoldError

_WHOLE = ("recall_items", "documents", "exit_documents", "opening", "branch_layers", "prompt_tokens", "repeats")


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
