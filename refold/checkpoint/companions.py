"""The files that travel with the weights: tokenizer, chat template, generation config, licence."""

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from refold.errors import SourceError

_TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
}
# Each of these sets alone holds a vocabulary.
_VOCABULARIES = (
    {"tokenizer.json"},
    {"tokenizer.model"},
    {"vocab.json", "merges.txt"},
    {"vocab.txt"},
    {"spiece.model"},
    {"sentencepiece.bpe.model"},
    {"tekken.json"},
)
_OTHER_FILES = {"chat_template.jinja", "chat_template.json", "generation_config.json"}
_TEMPLATE_FOLDER = "additional_chat_templates"
_LICENCES = ("licen[cs]e*", "notice*", "copying*", "use_policy*")
_NEVER = {".py", ".pyc", ".so", ".sh", ".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".gguf", ".pkl"}


@dataclass(frozen=True)
class Companions:
    """What was copied: file names in order, and whether a tokenizer's vocabulary is among them."""

    copied: tuple[str, ...]
    has_tokenizer: bool


def is_companion(name: str) -> bool:
    """Says whether a file, named relative to its model folder, travels with the weights. Code and weights never do."""
    path = PurePosixPath(name)
    if path.suffix.lower() in _NEVER:
        return False
    if len(path.parts) == 2:
        return path.parts[0] == _TEMPLATE_FOLDER and path.suffix == ".jinja"
    if len(path.parts) != 1:
        return False
    return name in _TOKENIZER_FILES | _OTHER_FILES or any(fnmatch(name.lower(), pattern) for pattern in _LICENCES)


def has_tokenizer(names: Collection[str]) -> bool:
    """Says whether a folder with these files holds a tokenizer's vocabulary."""
    return any(needed <= set(names) for needed in _VOCABULARIES)


def copy_companions(source_folder: Path, target_folder: Path) -> Companions:
    """Copies a model's companions; links, such as a hub cache's, are followed to their content.

    Raises:
        SourceError: a companion is there and cannot be read.
    """
    candidates = [path.name for path in source_folder.iterdir()]
    candidates += [f"{_TEMPLATE_FOLDER}/{path.name}" for path in (source_folder / _TEMPLATE_FOLDER).glob("*.jinja")]
    names = sorted(name for name in candidates if is_companion(name) and not (source_folder / name).is_dir())
    for name in names:
        try:
            content = (source_folder / name).open("rb")
        except OSError as error:
            raise SourceError(f"{source_folder / name}: cannot be read ({error.strerror}); check the file") from None
        (target_folder / name).parent.mkdir(exist_ok=True)
        with content, (target_folder / name).open("wb") as target:
            shutil.copyfileobj(content, target, 1 << 20)
    return Companions(tuple(names), has_tokenizer(names))
