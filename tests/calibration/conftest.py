"""Opened sources for tests of calibration."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from refold.calibration.layers import SourceLayers
from refold.checkpoint.reader import CheckpointReader
from refold.data.packing import PackedSequence
from refold.sources.pieces import PieceReader
from refold.sources.source_model import SourceModel, read_source_model


class Opened(NamedTuple):
    """A source, ready to be measured."""

    model: SourceModel
    pieces: PieceReader
    layers: SourceLayers


@pytest.fixture
def open_source() -> Callable[[Path], Opened]:
    def open_(folder: Path) -> Opened:
        model = read_source_model(folder)
        pieces = PieceReader(model, CheckpointReader(folder))
        return Opened(model, pieces, SourceLayers(model, pieces, rows_at_once=2))

    return open_


@pytest.fixture
def rows() -> PackedSequence:
    """Three rows of one document each."""
    ids = torch.randint(2, 95, (3, 24), generator=torch.Generator().manual_seed(5))
    return PackedSequence(ids, torch.arange(24).expand(3, -1), ids)
