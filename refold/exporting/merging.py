"""The weights a depth computes with: factors and LoRAs merged, own or tied vectors, zeros for a dropped part."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refold.blueprint.schema import Blueprint, Pool
from refold.blueprint.source_tensors import canonical_tensors
from refold.checkpoint.reader import CheckpointReader


class DepthWeights:
    """Reads canonical tensors, such as `mixer.q_proj.weight`, as they act at one depth of a folded model.

    Args:
        blueprint: The model's.
        reader: Its tensors.
    """

    def __init__(self, blueprint: Blueprint, reader: CheckpointReader):
        self._blueprint, self._reader = blueprint, reader
        self._shapes = canonical_tensors(blueprint.arch)

    def read(self, canonical: str, depth: int | None, dtype: torch.dtype) -> Tensor:
        """Returns one tensor in `dtype`; W + B A is summed in float32 (float64 where that is stored) and cast once.

        Args:
            canonical: Its name; outside the layers `embed_tokens.weight`, `norm.weight`, `lm_head.weight`, ...
            depth: The depth; None outside the layers.
            dtype: What it is wanted in.

        Raises:
            SourceError: A file is damaged.
        """
        if depth is None:
            prefix = "" if canonical == "lm_head.weight" else "model."
            return self._reader.read(f"{prefix}{canonical}", dtype)
        pool: Pool = "mixer" if canonical.startswith("mixer.") else "mlp"
        local = canonical.removeprefix(f"{pool}.")
        spec = self._blueprint.depths[depth]
        part = getattr(spec, pool)
        if part is None:
            return self._neutral(canonical, dtype)
        stored = f"model.{pool}s.{part}.{local}"
        linear, _, kind = local.rpartition(".")
        held, own = self._blueprint.pool(pool)[part], f"model.depths.{depth}"
        pairs = [(f"{own}.lora.{linear}.a", f"{own}.lora.{linear}.b")] if linear in spec.ranks else []
        if linear in held.bases:
            pairs.insert(0, (stored.replace(".weight", ".a.weight"), f"{own}.coefficients.{linear}"))
        elif held.factors.get(linear):
            pairs.insert(0, (stored.replace(".weight", ".a.weight"), stored.replace(".weight", ".b.weight")))
        if kind == "weight" and pairs:
            is_whole = linear not in held.bases and linear not in held.factors
            return self._merged(stored if is_whole else None, pairs, dtype)
        is_vector = len(self._shapes[canonical]) == 1
        is_own = is_vector and spec.vectors == "own"
        return self._reader.read(f"{own}.vectors.{pool}.{local}" if is_own else stored, dtype)

    def _merged(self, stored: str | None, pairs: Sequence[tuple[str, str]], dtype: torch.dtype) -> Tensor:
        """W, where one is stored, plus B A of each pair."""
        wide, found = torch.promote_types(dtype, torch.float32), None
        if stored is not None:
            wide = torch.promote_types(self._reader.read(stored).dtype, torch.float32)
            found = self._reader.read(stored, wide)
        for names in pairs:
            a, b = (self._reader.read(name, wide) for name in names)
            found = b @ a if found is None else torch.addmm(found, b, a)
        assert found is not None
        return found.to(dtype)

    def _neutral(self, canonical: str, dtype: torch.dtype) -> Tensor:
        """A tensor of a part that adds nothing: zeros, and norms that only normalise."""
        value = torch.zeros(self._shapes[canonical], dtype=dtype)
        if canonical.endswith("_norm.weight"):
            value += 1.0 - self._blueprint.arch.norm.offset
        return value
