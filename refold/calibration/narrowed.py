"""A source whose parts have lost neurons and heads: its weights, refitted, and its moments."""

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from refold.blueprint.part_sizes import LAST_LINEARS
from refold.blueprint.schema import Pool
from refold.calibration.moments import MomentStore
from refold.calibration.weighting import Moments
from refold.calibration.widths import refitted, unit_columns
from refold.families.arch import ArchSpec
from refold.sources.pieces import PieceReader

FIRST_LINEARS: Mapping[Pool, tuple[str, ...]] = {
    "mixer": ("q_proj", "k_proj", "v_proj"),
    "mlp": ("gate_proj", "up_proj"),
}
"""The linears of each pool whose outputs belong to units."""
Kept = Mapping[tuple[Pool, int], Int[Tensor, " kept"]]
"""Kept units of narrower parts, ascending, by pool and source layer."""


def kept_rows(arch: ArchSpec, pool: Pool, linear: str, kept: Int[Tensor, " kept"]) -> Int[Tensor, " rows"]:
    """Returns the outputs of a linear, or the inputs of the last one, that belong to kept units."""
    if pool == "mlp":
        return kept
    readers = arch.num_attention_heads // arch.num_key_value_heads
    return unit_columns(kept, arch.head_dim * (readers if linear in ("q_proj", "o_proj") else 1))


class NarrowedMoments(MomentStore):
    """Moments of a narrowed source: inputs and gradients of dropped units are left out.

    Args:
        store: Moments of the whole source.
        arch: The source.
        kept: Kept units.
    """

    def __init__(self, store: MomentStore, arch: ArchSpec, kept: Kept):
        super().__init__(store.folder, store.shrinkage)
        self._store, self._arch, self._kept = store, arch, kept

    def read(self, layer: int, linear: str) -> Moments:
        inputs, outputs = self._store.read(layer, linear)
        for pool, firsts in FIRST_LINEARS.items():
            kept = self._kept.get((pool, layer))
            if kept is None:
                continue
            rows = kept_rows(self._arch, pool, linear, kept)
            if linear == LAST_LINEARS[pool]:
                inputs = inputs[rows[:, None], rows]
            elif linear in firsts and outputs is not None:
                outputs = outputs[rows[:, None], rows]
        return Moments(inputs, outputs)


class NarrowedPieces(PieceReader):
    """Reader of a narrowed source. `down_proj` and `o_proj` are refitted to the kept units.

    Args:
        pieces: Reader of the whole source.
        kept: Kept units.
        store: Moments of the whole source; None: nothing is refitted.
        device: Device that fits.
    """

    def __init__(self, pieces: PieceReader, kept: Kept, store: MomentStore | None, device: str = "cpu"):
        super().__init__(pieces.model, pieces.reader)
        self._pieces, self._kept, self._store, self._device = pieces, kept, store, device

    def read(self, canonical: str, layer: int | None, dtype: torch.dtype, repeat: int = 1) -> Tensor:
        pool: Pool = "mixer" if canonical.startswith("mixer.") else "mlp"
        linear, _, kind = canonical.removeprefix(f"{pool}.").partition(".")
        kept = None if layer is None else self._kept.get((pool, layer))
        if kept is None or linear not in (*FIRST_LINEARS[pool], LAST_LINEARS[pool]):
            return self._pieces.read(canonical, layer, dtype, repeat)
        assert repeat == 1, "only the source's own attention loses heads"
        rows = kept_rows(self.model.arch, pool, linear, kept)
        if linear != LAST_LINEARS[pool]:
            return self._pieces.read(canonical, layer, dtype)[rows]
        if kind == "bias":
            return self._pieces.read(canonical, layer, dtype)
        if self._store is None:
            return self._pieces.read(canonical, layer, dtype)[:, rows]
        assert layer is not None
        weight = self._pieces.read(canonical, layer, torch.float32).to(self._device)
        inputs = self._store.read(layer, linear).inputs.to(self._device)
        return refitted(weight, inputs, rows).cpu().to(dtype)
