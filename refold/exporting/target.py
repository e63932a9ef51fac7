"""What an export target is: a plug point, one file each, one registry entry."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from refold.blueprint.schema import Blueprint
from refold.checkpoint.folder import AtomicFolder
from refold.checkpoint.reader import CheckpointReader


@dataclass(frozen=True)
class ExportJob:
    """A folded model that is open for reading, and the folder that is being made of it.

    Attributes:
        blueprint: The model's.
        config: Its `config.json` as it is written.
        reader: Its tensors.
        out: Where to write; hashes of written files may be added to it.
        dtype: What numbers are stored as.
    """

    blueprint: Blueprint
    config: dict
    reader: CheckpointReader
    out: AtomicFolder
    dtype: torch.dtype


@dataclass(frozen=True)
class ExportTarget:
    """A format models can be exported to.

    Attributes:
        name: What `--to` takes.
        url: Where the format is described.
        summary: One line for listings.
        usage: Python that loads what it writes, for the model card.
        count_bytes: Bytes of the weights it will write, for a blueprint and what a number takes.
        write: Writes weights and config into the job's folder and returns sentences for the model card. Companions,
            card and provenance are written by `export`.
    """

    name: str
    url: str
    summary: str
    usage: str
    count_bytes: Callable[[Blueprint, int], int]
    write: Callable[[ExportJob], tuple[str, ...]]
