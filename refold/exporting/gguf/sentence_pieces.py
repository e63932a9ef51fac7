"""SentencePiece vocabularies out of `tokenizer.json`: scores in place of merges, and the proof that both are equal."""

from collections.abc import Mapping, Sequence
from typing import Any

from refold.errors import ExportError

SPACE = "\u2581"
"""The sign that stands for a space."""


def score_tokens(
    tokens: Mapping[str, int], merges: Sequence[tuple[str, str]], special: set[str], where: str
) -> list[float]:
    """Returns the score of each token: llama.cpp joins the two pieces whose union has the highest score.

    BPE joins the pair whose merge comes first. Both agree if all merges into one token stand together, and if each way
    to cut a token into two tokens is a merge; then a token's score is minus its place.

    Args:
        tokens: Id by token.
        merges: Pairs in the order of their rank.
        special: Tokens that are not made by merges.
        where: The file, for the message.

    Raises:
        ExportError: The merges cannot be expressed by scores.
    """
    scores = [0.0] * (max(tokens.values(), default=-1) + 1)
    last, place = "", 0
    placed: set[str] = set()
    for left, right in merges:
        union = left + right
        if union != last:
            if union in placed:
                raise _unequal(where, f"merges into {union!r} stand apart")
            placed.add(union)
            place += 1
            last = union
            if union in tokens:
                scores[tokens[union]] = -float(place)
    pairs = set(merges)
    for token in tokens:
        if token in special or is_byte_token(token):
            continue
        for cut in range(1, len(token)):
            halves = token[:cut], token[cut:]
            if halves[0] in tokens and halves[1] in tokens and halves not in pairs:
                raise _unequal(where, f"{halves[0]!r} and {halves[1]!r} make a token but are no merge")
    return scores


def has_prefix(normalizer: Mapping[str, Any] | None, pre: Mapping[str, Any] | None, where: str) -> bool:
    """Says whether a space is put in front of a text; checks that nothing else is done to it.

    Raises:
        ExportError: The text is changed in a way that llama.cpp does not know.
    """
    steps = _steps(normalizer, "normalizers") + _steps(pre, "pretokenizers")
    prefixed = replaced = False
    for step in steps:
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prefixed = True
        elif kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE:
            replaced = True
        elif kind == "Metaspace" and step.get("replacement", SPACE) == SPACE and not step.get("split", True):
            replaced = True
            prefixed = step.get("prepend_scheme", "always") != "never"
        elif kind == "Split" and step.get("pattern") == {"String": " "} and replaced:
            # There is no space left that could be split at.
            continue
        else:
            raise _unequal(where, f"step {kind} of its normalizer or pre-tokenizer is unknown there")
    if not replaced:
        raise _unequal(where, f"spaces are not replaced by {SPACE}")
    return prefixed


def is_byte_token(token: str) -> bool:
    """Says whether a token stands for one byte, such as `<0x0A>`."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _steps(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step.get(key, ())) if step.get("type") == "Sequence" else [step]


def _unequal(where: str, reason: str) -> ExportError:
    return ExportError(
        f"{where}: merges that SentencePiece scores can express are required, because llama.cpp has no others with "
        f"{SPACE!r} ({reason}); export with another tokenizer, or remove tokenizer.json from a copy of the folder to "
        f"write a file without a vocabulary"
    )
