"""The reader of canonical tensors from a source checkpoint, which splits fused tensors."""

import torch
from torch import Tensor

from refold.blueprint.source_tensors import canonical_tensors
from refold.checkpoint.finite import require_finite
from refold.checkpoint.reader import CheckpointReader
from refold.errors import SourceError
from refold.sources.source_model import SourceModel

MEND = "take an undamaged copy of the checkpoint"


class PieceReader:
    """Reads canonical tensors of a source, such as `mixer.q_proj.weight` of layer 3, from fused or unfused tensors.

    Args:
        model: The source.
        reader: The reader of its files; None for a source without weights, of which nothing may be read.
    """

    def __init__(self, model: SourceModel, reader: CheckpointReader | None):
        self.model, self.reader = model, reader
        self._shapes = canonical_tensors(model.arch)
        self._checked: set[str] = set()

    def read(self, canonical: str, layer: int | None, dtype: torch.dtype, repeat: int = 1) -> Tensor:
        """Returns a canonical tensor on the CPU in `dtype`. An unfused tensor in its own dtype is a view of the file.

        Each head of the tensor (`head_dim` rows) is repeated `repeat` times.

        Raises:
            SourceError: The file is damaged, or a number in the tensor is not finite.
        """
        assert self.reader is not None
        name, rule, index = self.model.locate(canonical, layer)
        packed = self.reader.read(name)
        if name not in self._checked:
            require_finite(packed, name, str(self.reader.path), SourceError, MEND)
            self._checked.add(name)
        rows = self._shapes[canonical][0]
        if rule.layout == "rows":
            start = sum(self._shapes[piece][0] for piece in rule.pieces[:index])
            packed = packed[start : start + rows]
        elif rule.layout == "heads":
            # [heads, pieces, head_dim] by rows, as GPT-NeoX packs query, key and value.
            heads = rows // self.model.arch.head_dim
            packed = packed.unflatten(0, (heads, len(rule.pieces), -1))[:, index].flatten(0, 1)
        if repeat > 1:
            packed = packed.unflatten(0, (-1, self.model.arch.head_dim)).repeat_interleave(repeat, dim=0).flatten(0, 1)
        return packed.to(dtype)
