"""The export target: a plug point with one file and one registry entry for each target."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from refold.blueprint.schema import Blueprint
from refold.checkpoint.folder import AtomicFolder
from refold.checkpoint.reader import CheckpointReader


@dataclass(frozen=True)
class ExportJob:
    """A folded model that is open for reading, and the folder to write.

    Attributes:
        blueprint: The model's blueprint.
        config: The raw content of its `config.json`.
        reader: Reader of its tensors.
        out: The folder to write; hashes of written files may be added to it.
        dtype: Dtype of the exported weights.
    """

    blueprint: Blueprint
    config: dict
    reader: CheckpointReader
    out: AtomicFolder
    dtype: torch.dtype


@dataclass(frozen=True)
class ExportTarget:
    """A format that models can be exported to.

    Attributes:
        name: The value of `--to`.
        url: Documentation of the format.
        summary: One line for listings.
        usage: Python code that loads the exported folder, for the model card.
        count_bytes: Returns the bytes of the exported weights, from a blueprint and the bytes of one number.
        write: Writes weights and config into the job's folder and returns sentences for the model card. Companions,
            card and provenance are written by `export`.
    """

    name: str
    url: str
    summary: str
    usage: str
    count_bytes: Callable[[Blueprint, int], int]
    write: Callable[[ExportJob], tuple[str, ...]]
