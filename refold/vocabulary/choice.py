"""The choice of the tokens that a model keeps."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refold.checkpoint.source_file import parse_object, read_file
from refold.errors import DataError, RecipeError
from refold.modeling.load import load_tokenizer
from refold.recipe.vocabulary import VocabularyTrim
from refold.sources.source_model import SourceModel
from refold.suggest import did_you_mean, shorten
from refold.vocabulary.counting import TokenCounts, template_ids
from refold.vocabulary.kept_tokens import KeptTokens, parse_kept_tokens
from refold.vocabulary.tokenizer_file import TokenizerFile, read_tokenizer_file

_CONFIGS = ("config.json", "generation_config.json")
_ROLES = "_token"
"""Ending of the keys of `tokenizer_config.json` that name a special token."""


def trimmed_bytes(model: SourceModel, num_tokens: int) -> int:
    """Returns the bytes of embedding and head with `num_tokens` tokens; a tied head counts once.

    Args:
        model: The source.
        num_tokens: Number of kept tokens.
    """
    tables = 1 if model.arch.tied_head else 2
    return tables * num_tokens * model.arch.hidden_size * model.dtype_bytes


def choose_tokens(model: SourceModel, section: VocabularyTrim, counts: TokenCounts | None = None) -> KeptTokens:
    """Chooses the tokens to keep.

    Args:
        model: The source.
        section: The recipe's section `vocabulary`.
        counts: Result of `count_tokens`; needed for `keep: used`, else None.

    Raises:
        RecipeError: A token, or the file with tokens, does not exist; or there are no counts for `keep: used`.
        SourceError: The source has no `tokenizer.json`, or one of a kind that cannot be cut.
        DataError: The text has no token often enough.
    """
    folder, size = model.source.fetch_companions(), model.arch.vocab_size
    file = read_tokenizer_file(folder)
    listed = None if section.counts_text else _read_list(Path(section.keep), file, size)
    if listed is None and counts is None:
        raise RecipeError(
            "vocabulary.keep: calibration text is required for `used` (got none); give --calibration FILE (in Python: "
            "calibration=[FILE]), or name a file of tokens"
        )
    seen = listed if counts is None or listed is not None else _seen(counts, section.least)
    named = _special_ids(folder, file) | template_ids(load_tokenizer(model.source))
    named |= {_find(token, file, size, f"vocabulary.always[{place}]") for place, token in enumerate(section.always)}
    assert seen is not None
    wanted = {*seen, *named, *file.required(), *(file.added.values() if section.added == "all" else ())}
    kept = file.closure({each for each in wanted if each < size})
    kept = _round_up({each for each in kept if each < size}, file, counts, size, section.multiple)
    return KeptTokens(np.array(sorted(kept), dtype=np.int64), size)


def _seen(counts: TokenCounts, least: int) -> set[int]:
    found = set(np.flatnonzero(counts >= least).tolist())
    if not found:
        raise DataError(
            f"vocabulary.least: a token that the text has at least {least:,} times is required (got "
            f"{int(counts.max(initial=0)):,} times at most); give more text, or lower `least`"
        )
    return found


def _round_up(kept: set[int], file: TokenizerFile, counts: TokenCounts | None, size: int, multiple: int) -> set[int]:
    """Adds tokens, the most frequent first, until their number is a multiple, or the source has no more rows."""
    goal = min(size, -(-len(kept) // multiple) * multiple)
    frequency = np.zeros(size, dtype=np.int64) if counts is None else counts
    added = set(file.added.values())
    # Where the text has no more tokens, low ids come first: tokenizers number tokens from frequent to rare. Rows
    # without a token are the last choice.
    rest = sorted(
        (each for each in range(size) if each not in kept),
        key=lambda each: (each not in file.names, -frequency[each], each in added, each),
    ) if len(kept) < goal else []  # fmt: skip
    while len(kept) < goal:
        # A token whose path does not fit into the room is passed over; one that needs no other token always fits.
        before = len(kept)
        for each in rest:
            if each in kept:
                continue
            more = {new for new in file.closure({each}) if new < size} - kept
            if len(more) <= goal - len(kept):
                kept = kept | more
            if len(kept) == goal:
                break
        assert len(kept) > before, "a token without others on its path always fits"
    return kept


def _special_ids(folder: Path, file: TokenizerFile) -> set[int]:
    """Returns the ids that the configs of a model name: start, end, padding, suppressed tokens and the like."""
    found: set[int] = set()
    for name in _CONFIGS:
        for key, value in _read(folder / name).items():
            found |= set(_ids_of(key, value))
    settings = _read(folder / "tokenizer_config.json")
    named = [value for key, value in settings.items() if key.endswith(_ROLES)]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.get(key) or []
        named += value.values() if isinstance(value, dict) else value
    texts = [each.get("content") if isinstance(each, dict) else each for each in named]
    return found | {file.ids[text] for text in texts if isinstance(text, str) and text in file.ids}


ID_KEYS = ("_token_id", "suppress_tokens", "bad_words_ids", "forced_decoder_ids")
"""Endings of the keys of configs whose values are ids of tokens."""


def _ids_of(key: str, value: Any) -> Iterator[int]:
    """Yields the ids in a value of a config."""
    if type(value) is int and key.endswith(ID_KEYS):
        if value >= 0:
            yield value
    elif isinstance(value, list):
        for each in value:
            yield from _ids_of(key, each)
    elif isinstance(value, dict):
        for inner, each in value.items():
            yield from _ids_of(inner, each)


def _read(path: Path) -> Mapping[str, Any]:
    return parse_object(read_file(path), str(path), "mend the file or remove it") if path.is_file() else {}


def _read_list(path: Path, file: TokenizerFile, size: int) -> set[int]:
    """Returns the ids of a list of tokens."""
    if not path.is_file():
        raise RecipeError(
            f"vocabulary.keep: `used` or the path of a token list is required (got {str(path)!r}, where no file is)"
            f"{did_you_mean(str(path), ['used'])}"
        )
    text = read_file(path).decode("utf-8", "replace")
    if path.suffix != ".json":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line]
        return {_find(line, file, size, f"{path}:{number}") for number, line in lines}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise RecipeError(f"{path}: JSON is required ({error}); mend the file") from None
    if isinstance(found, dict):
        kept = parse_kept_tokens(found, str(path))
        if kept.source_size != size:
            raise RecipeError(
                f"{path}: kept tokens of a vocabulary of {size:,} tokens are required (got one of "
                f"{kept.source_size:,}); give the list of a model that was made from this source"
            )
        return set(kept.ids.tolist())
    if not isinstance(found, list) or not all(isinstance(each, str) or type(each) is int for each in found):
        raise RecipeError(f"{path}: a list of tokens or ids is required (got {shorten(found)}); mend the file")
    return {_find(each, file, size, f"{path}[{place}]") for place, each in enumerate(found)}


def _find(token: str | int, file: TokenizerFile, size: int, where: str) -> int:
    """Returns the id of a token."""
    if isinstance(token, int):
        if not 0 <= token < size:
            raise RecipeError(f"{where}: token {token} is out of range (vocabulary of {size} tokens: 0..{size - 1})")
        return token
    number = file.ids.get(token)
    if number is None or number >= size:
        raise RecipeError(
            f"{where}: a token of {file.where} is required (got {shorten(token)}){_similar(token, file.ids)}; write it "
            f"as there, with its mark for a space"
        )
    return number


def _similar(token: str, legal: Collection[str]) -> str:
    marked = [mark + token.lstrip() for mark in ("\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}", "\u2581")]
    found = next((each for each in marked if each in legal), None)
    return "" if found is None else f"; did you mean '{found}'?"
