"""Kinds of folders that are given as a model and are none, each with the remedy for the message."""

import json
from collections.abc import Collection
from pathlib import Path

_MAX_SUBFOLDERS = 200


def explain_missing_config(names: Collection[str], path: Path | None = None) -> str:
    """Returns the reason why a folder without `config.json` is no model, and the remedy: `got ...); give ...`.

    Args:
        names: Names of its files and folders.
        path: The folder; None if it is not local.
    """
    endings = {name.rpartition(".")[2].lower() for name in names if "." in name}
    if "adapter_config.json" in names:
        return (
            f"got an adapter of PEFT{_base_of(path)}); load it with PEFT on its base model, merge_and_unload(), "
            f"save_pretrained(), and give that folder"
        )
    if "gguf" in endings:
        return "got GGUF files, which are read from a disk); download one and give its path"
    if "summary.json" in names and "folded" in names:
        return f"got a folder of `refold run`); give the model in it: {(path or Path()) / 'folded' / 'model'}"
    if "measurements.json" in names:
        return "got measurements of `refold analyse`); give their source, and this folder with --measurements"
    if "model_index.json" in names:
        return "got a pipeline of diffusers); give a language model"
    if "snapshots" in names and path is not None:
        commits = _models_in(path / "snapshots")
        return "got a repository of the hub's cache); give a snapshot in it" + (f": {commits[0]}" if commits else "")
    if {"params.json"} & set(names) and {"pth", "bin"} & endings:
        return "got weights in their author's layout); convert them with transformers' conversion script first"
    inner = [] if path is None else _models_in(path)
    if inner:
        return f"missing); give one of the model folders in it: {', '.join(map(str, inner[:3]))}"
    return "missing); give a transformers model folder"


def _base_of(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        with (path / "adapter_config.json").open("rb") as file:
            base = json.loads(file.read(1 << 20))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" for {base[:100]}" if isinstance(base, str) and base.isprintable() else ""


def _models_in(path: Path) -> list[Path]:
    """Returns the folders right below one that hold a `config.json`."""
    try:
        inner = sorted(path.iterdir())[:_MAX_SUBFOLDERS]
        return [each for each in inner if (each / "config.json").is_file()]
    except OSError:
        return []
