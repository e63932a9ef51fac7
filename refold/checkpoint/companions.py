"""The files that travel with the weights: tokenizer, chat template, generation config, licence."""

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from refold.checkpoint.source_file import open_file, parse_object, read_file
from refold.errors import SourceError

KEPT_TOKENS_NAME = "kept_tokens.json"
"""The file of a cut vocabulary: the source's id of each token."""
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
_OTHER_FILES = {"chat_template.jinja", "chat_template.json", "generation_config.json", KEPT_TOKENS_NAME}
_OBJECTS = {
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    KEPT_TOKENS_NAME,
}
_TEMPLATE_FOLDER = "additional_chat_templates"
_LICENCES = ("licen[cs]e*", "notice*", "copying*", "use_policy*")
_NEVER = {".py", ".pyc", ".so", ".sh", ".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".gguf", ".pkl"}


@dataclass(frozen=True)
class Companions:
    """Copied files: their names in order, and whether a tokenizer's vocabulary is among them."""

    copied: tuple[str, ...]
    has_tokenizer: bool


def is_companion(name: str) -> bool:
    """Tells whether a file, named relative to its model folder, is copied along with the weights; code never is."""
    path = PurePosixPath(name)
    if path.suffix.lower() in _NEVER:
        return False
    if len(path.parts) == 2:
        return path.parts[0] == _TEMPLATE_FOLDER and path.suffix == ".jinja"
    if len(path.parts) != 1:
        return False
    return name in _TOKENIZER_FILES | _OTHER_FILES or any(fnmatch(name.lower(), pattern) for pattern in _LICENCES)


def has_tokenizer(names: Collection[str]) -> bool:
    """Tells whether a folder with these files holds a tokenizer's vocabulary."""
    return any(needed <= set(names) for needed in _VOCABULARIES)


def offers_tokenizer(folder: Path) -> bool:
    """Tells whether a folder holds a tokenizer's vocabulary."""
    return has_tokenizer([path.name for path in folder.iterdir()])


def check_companions(folder: Path) -> list[str]:
    """Checks that a model's companions may be read and published, and returns their names.

    Raises:
        SourceError: a companion cannot be read, is no plain file, or lies outside the folder; or one of the small JSON
            files holds no object.
    """
    entries = list(folder.iterdir())
    for path in entries:
        # A reader of a pipe waits for ever, even if only transformers opens the file.
        if path.exists() and not path.is_file() and not path.is_dir():
            open_file(path).close()
    candidates = [path.name for path in entries]
    candidates += [f"{_TEMPLATE_FOLDER}/{path.name}" for path in (folder / _TEMPLATE_FOLDER).glob("*.jinja")]
    names = sorted(name for name in candidates if is_companion(name) and not (folder / name).is_dir())
    for name in names:
        _require_inside(folder, name)
        open_file(folder / name).close()
        if name in _OBJECTS:
            parse_object(read_file(folder / name), str(folder / name), "mend the file or remove it")
    return names


def copy_companions(source_folder: Path, target_folder: Path) -> Companions:
    """Copies a model's companions; a link within the folder, or into its hub cache, is copied as a file.

    Raises:
        SourceError: as `check_companions`.
    """
    names = check_companions(source_folder)
    for name in names:
        (target_folder / name).parent.mkdir(exist_ok=True)
        with open_file(source_folder / name) as content, (target_folder / name).open("wb") as target:
            shutil.copyfileobj(content, target, 1 << 20)
    return Companions(tuple(names), has_tokenizer(names))


def _require_inside(folder: Path, name: str) -> None:
    """Refuses a link out of the folder, because a copy would publish an unrelated file.

    A link into the hub's cache is allowed: the cache keeps the files of `snapshots/COMMIT` in `blobs`."""
    root, real = folder.resolve(), (folder / name).resolve()
    allowed = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    if not any(real.is_relative_to(place) for place in allowed):
        raise SourceError(
            f"{folder / name}: a file inside the model's folder is required (it links to {real}); copy it there"
        )
