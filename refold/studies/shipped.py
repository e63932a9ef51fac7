"""The model that ships in the package, and the text of the standard library on which it was trained."""

import json
import shutil
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path

from refold.data.readers import DataSource, from_documents
from refold.errors import DataError, FolderError, SourceError

HELD_OUT: tuple[str, ...] = (
    "calendar",
    "configparser",
    "csv",
    "email",
    "fractions",
    "heapq",
    "http",
    "json",
    "statistics",
    "textwrap",
)
"""Top-level modules and packages that are not used for training. Python 3.11 and later has them on every platform."""

_EXCLUDED_FOLDERS = frozenset({"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"})
_EXCLUDED_FILES = frozenset({"html/entities.py", "pydoc_data/topics.py"})  # one long literal each


def training_documents() -> Iterator[str]:
    """Yields the sources outside `HELD_OUT`, in order of path, then pydoc's topics, in order of name.

    Raises:
        DataError: the standard library's sources or pydoc's topics are missing, or a source cannot be read.
    """
    return _training_documents(_stdlib())


def held_out_documents() -> Iterator[str]:
    """Yields the sources of the modules in `HELD_OUT`, in order of path.

    Raises:
        DataError: the standard library's sources are missing, one of the modules is missing, or a source cannot be
            read.
    """
    root = _stdlib()
    missing = [name for name in HELD_OUT if not ((root / f"{name}.py").is_file() or (root / name).is_dir())]
    if missing:
        raise DataError(
            f"{root}: the standard library's modules {', '.join(HELD_OUT)} are required (missing: "
            f"{', '.join(missing)}); use a complete installation of Python"
        )
    return (text for path in _sources(root) if _module(root, path) in HELD_OUT for text in _read(path))


def _training_documents(root: Path) -> Iterator[str]:
    for path in _sources(root):
        if _module(root, path) not in HELD_OUT:
            yield from _read(path)
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            f"{root}: pydoc's topics are required (got {error}); use a complete installation of Python"
        ) from error
    for name in sorted(topics):
        yield topics[name]


def _stdlib() -> Path:
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").is_file():
        raise DataError(
            f"{root}: the standard library's .py sources are required (got no os.py there); use an installation of "
            "Python that is neither zipped nor frozen"
        )
    return root


def _module(root: Path, path: Path) -> str:
    return path.relative_to(root).parts[0].removesuffix(".py")


def _sources(root: Path) -> list[Path]:
    """Returns the .py files in order of path, without tests and without files that differ between machines."""
    kept = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _EXCLUDED_FOLDERS.isdisjoint(relative.parts) and relative.as_posix() not in _EXCLUDED_FILES:
            built_here = relative.name.startswith("_sysconfigdata") or relative.parts[0].startswith("config-")
            if not built_here:
                kept.append(path)
    return sorted(kept, key=lambda path: path.relative_to(root).as_posix())


def _read(path: Path) -> Iterator[str]:
    """Yields the text of one source file, unless it is empty or the character table of an encoding."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: a readable Python source is required (got {error}); mend the installation of Python"
        ) from error
    is_character_table = path.parent.name == "encodings" and ("decoding_table" in text or "decoding_map" in text)
    if text.strip() and not is_character_table:
        yield text


SHIPPED_NAME = "stdlib-5m"


def shipped_model() -> Path:
    """Returns the folder of the model that ships with refold.

    Raises:
        SourceError: The installation has no such folder.
    """
    with as_file(files("refold") / "shipped" / SHIPPED_NAME) as folder:
        if not (folder / "config.json").is_file():
            raise SourceError(f"{folder}: the shipped model is required (not there); install refold again")
        return Path(folder)


def training_data() -> DataSource:
    """Returns the standard library of the running Python without the held-out modules."""
    return from_documents(training_documents(), name="the standard library")


def held_out_data() -> DataSource:
    """Returns the held-out modules of the running Python's standard library."""
    return from_documents(held_out_documents(), name="held-out modules of the standard library")


def copy_out(folder: Path) -> None:
    """Copies the shipped model and writes its texts: `stdlib-5m`, `train.jsonl` and `held-out.jsonl`.

    Args:
        folder: A new folder.

    Raises:
        FolderError: There is such a folder already.
        DataError: The standard library's sources are missing.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise FolderError(f"{folder}: a new folder is required (there is one already); choose another name") from None
    shutil.copytree(shipped_model(), folder / SHIPPED_NAME)
    for name, documents in (("train", training_documents), ("held-out", held_out_documents)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents())


if __name__ == "__main__":
    copy_out(Path(sys.argv[1] if len(sys.argv) > 1 else "shipped"))
