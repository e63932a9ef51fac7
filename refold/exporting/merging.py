"""The weights a depth computes with: stored part and LoRA merged, own or tied vectors, zeros for a dropped part."""

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
        factor = self._blueprint.pool(pool)[part].factors.get(linear)
        if kind == "weight" and (linear in spec.ranks or factor is not None):
            lora = f"model.depths.{depth}.lora.{linear}" if linear in spec.ranks else None
            return self._merged(stored, factor, lora, dtype)
        is_vector = len(self._shapes[canonical]) == 1
        own = is_vector and spec.vectors == "own"
        return self._reader.read(f"model.depths.{depth}.vectors.{pool}.{local}" if own else stored, dtype)

    def _merged(self, stored: str, factor: int | None, lora: str | None, dtype: torch.dtype) -> Tensor:
        """W, or B A of its factors, plus B A of the LoRA."""
        wide = torch.promote_types(dtype, torch.float32)
        found: Tensor | None = None
        if factor is None:
            wide = torch.promote_types(self._reader.read(stored).dtype, torch.float32)
            found = self._reader.read(stored, wide)
        elif factor > 0:
            prefix = stored.removesuffix(".weight")
            a, b = (self._reader.read(f"{prefix}.{name}.weight", wide) for name in "ab")
            found = b @ a
        if lora is not None:
            a, b = (self._reader.read(f"{lora}.{name}", wide) for name in "ab")
            found = b @ a if found is None else torch.addmm(found, b, a)
        assert found is not None
        return found.to(dtype)

    def _neutral(self, canonical: str, dtype: torch.dtype) -> Tensor:
        """A tensor of a part that adds nothing: zeros, and norms that only normalise."""
        value = torch.zeros(self._shapes[canonical], dtype=dtype)
        if canonical.endswith("_norm.weight"):
            value += 1.0 - self._blueprint.arch.norm.offset
        return value
