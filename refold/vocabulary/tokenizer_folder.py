"""The tokenizer of a cut vocabulary in a model folder, with every id in it and beside it mapped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from refold.checkpoint.source_file import parse_object, read_file
from refold.errors import SourceError
from refold.vocabulary.choice import ID_KEYS
from refold.vocabulary.kept_tokens import KeptTokens
from refold.vocabulary.tokenizer_file import NAME, read_tokenizer_file, write_json

_WHOLE_VOCABULARIES = (
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "added_tokens.json",
)
"""Files with the vocabulary of the source, which some loaders would prefer to `tokenizer.json`."""


def cut_tokenizer(folder: Path, kept: KeptTokens) -> None:
    """Cuts the companions of a source that were copied into a folder: tokenizer, settings and generation config.

    Vocabularies beside `tokenizer.json` are removed, and `kept_tokens.json` is written.

    Args:
        folder: The folder, with a config of the model.
        kept: The kept tokens.

    Raises:
        SourceError: transformers makes another vocabulary of the cut `tokenizer.json`.
    """
    file, numbers = read_tokenizer_file(folder), kept.numbers
    write_json(folder / NAME, file.cut(numbers))
    for name in _WHOLE_VOCABULARIES:
        (folder / name).unlink(missing_ok=True)
    _rewrite(folder / "tokenizer_config.json", numbers)
    _rewrite(folder / "generation_config.json", numbers)
    kept.write(folder)
    _require_loaded(folder, {token: numbers[each] for token, each in file.ids.items() if each in numbers})


def map_ids(value: Any, numbers: Mapping[int, int], key: str = "") -> Any:
    """Returns a value of a config with its token ids mapped; ids of dropped tokens are removed from lists.

    Args:
        value: The value.
        numbers: New id of each kept token, by its id.
        key: The key of the value; a value is an id if the key says so.
    """
    if isinstance(value, dict):
        return {name: map_ids(each, numbers, name) for name, each in value.items()}
    if isinstance(value, list):
        mapped = [map_ids(each, numbers, key) for each in value]
        return [each for old, each in zip(value, mapped, strict=True) if each is not None or old is None]
    if type(value) is int and key.endswith(ID_KEYS):
        return numbers.get(value)
    return value


def _rewrite(path: Path, numbers: Mapping[int, int]) -> None:
    if not path.is_file():
        return
    found = map_ids(parse_object(read_file(path), str(path), "mend the file or remove it"), numbers)
    listed = found.get("added_tokens_decoder")
    if listed is not None:
        kept = {int(number): token for number, token in listed.items() if int(number) in numbers}
        found["added_tokens_decoder"] = {str(numbers[number]): token for number, token in kept.items()}
    write_json(path, found)


def _require_loaded(folder: Path, expected: Mapping[str, int]) -> None:
    """Checks that transformers reads the cut vocabulary as it was written, because some classes rebuild it."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    found = tokenizer.get_vocab()
    if found != expected:
        different = sorted(token for token, _ in found.items() ^ expected.items())
        raise SourceError(
            f"vocabulary: a tokenizer that transformers loads as it is written is required (got {len(different):,} "
            f"other tokens of {type(tokenizer).__name__}, such as {different[0]!r}); remove `vocabulary`"
        )
