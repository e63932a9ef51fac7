"""Dense weights of one depth: tensors that the depth owns are merged, a dropped part is zero, a narrower one padded."""

import torch
from torch import Tensor

from refold.blueprint.integers import Scheme
from refold.blueprint.owned.merge import Merge
from refold.blueprint.owned.registry import merge_at
from refold.blueprint.part_sizes import widest_arch
from refold.blueprint.schema import Blueprint, Pool
from refold.blueprint.source_tensors import canonical_tensors
from refold.exporting.integer_blocks import IntegerBlocks, to_blocks
from refold.exporting.opened import IntegerSource, TensorSource
from refold.exporting.stored_schemes import StoredSchemes, holds
from refold.nn.rounding import Rounded


class StackWeights:
    """Reads the effective value of canonical tensors, such as `mixer.q_proj.weight`, at a depth of a folded model.

    Args:
        blueprint: The model's blueprint.
        reader: Reader of its tensors.
        pads: Whether tensors of narrower parts are padded with zeros to the widest part.
    """

    def __init__(self, blueprint: Blueprint, reader: TensorSource, pads: bool = True):
        self._blueprint, self._reader, self._pads = blueprint, reader, pads
        self._shapes, self._schemes = canonical_tensors(widest_arch(blueprint)), StoredSchemes(blueprint)

    @property
    def blueprint(self) -> Blueprint:
        """The blueprint whose weights are read."""
        return self._blueprint

    def read(self, canonical: str, depth: int | None, dtype: torch.dtype) -> Tensor:
        """Returns one tensor in `dtype`, merged in float32 (or stored float64) and cast once.

        Args:
            canonical: Canonical name; outside the layers `embed_tokens.weight`, `norm.weight`, `lm_head.weight`, ...
            depth: The depth; None outside the layers.
            dtype: Dtype of the result.

        Raises:
            SourceError: A file is damaged.
        """
        if depth is None:
            prefix = "" if canonical == "lm_head.weight" else "model."
            return self._reader.read(f"{prefix}{canonical}", dtype)
        pool: Pool = "mixer" if canonical.startswith("mixer.") else "mlp"
        local = canonical.removeprefix(f"{pool}.")
        merge = merge_at(self._blueprint, depth, pool, local)
        if merge is None:
            return self._neutral(canonical, dtype)
        if merge.stored is not None and not merge.products and merge.scale is None:
            return self._padded(canonical, depth, self._reader.read(merge.stored, dtype))
        return self._padded(canonical, depth, self._merged(merge, dtype))

    def _may_pad(self, canonical: str, depth: int | None) -> bool:
        """Says whether a tensor has a width of the source: those of mixers of other types have their own."""
        if depth is None or not self._pads:
            return False
        index = self._blueprint.depths[depth].mixer
        if index is None or not canonical.startswith("mixer."):
            return True
        return self._blueprint.mixers[index].mixer.type == "attention"

    def _padded(self, canonical: str, depth: int, value: Tensor) -> Tensor:
        """Returns a tensor with zeros behind its rows and columns, up to the widest part."""
        if not self._may_pad(canonical, depth) or value.shape == (wanted := self._shapes[canonical]):
            return value
        found = value.new_zeros(wanted)
        found[tuple(slice(size) for size in value.shape)] = value
        return found

    def _is_padded(self, canonical: str, depth: int | None) -> bool:
        """Says whether a tensor of a depth gets zeros, so that its stored integers cannot be taken over."""
        if depth is None or not self._may_pad(canonical, depth):
            return False
        pool: Pool = "mixer" if canonical.startswith("mixer.") else "mlp"
        own = self._blueprint.part_arch(pool, getattr(self._blueprint.depths[depth], pool))
        return canonical_tensors(own)[canonical] != self._shapes[canonical]

    def read_blocks(self, canonical: str, depth: int | None, bits: int) -> IntegerBlocks | None:
        """Returns the stored integers of a weight in blocks of 32, if the depth does not change the weight.

        Args:
            canonical: Canonical name, see `read`.
            depth: The depth; None outside the layers.
            bits: Width of the integers of a block.

        Returns:
            The blocks; None: the weight is stored otherwise, is a merge of several tensors, or does not fit blocks.

        Raises:
            SourceError: A file is damaged.
        """
        found = self._schemes.find(canonical, depth)
        if found is None or not found.is_whole or found.scheme is None or not holds(bits, found.scheme):
            return None
        if self._is_padded(canonical, depth):
            return None
        return to_blocks(self._reader.read_rounded(found.name)) if isinstance(self._reader, IntegerSource) else None

    def read_rounded(self, canonical: str, depth: int, scheme: Scheme) -> Rounded | None:
        """Returns the integers of a weight at a depth that is stored by a scheme and that the depth does not change.

        Args:
            canonical: Canonical name of a weight in a layer.
            depth: The depth.
            scheme: The scheme.

        Returns:
            The integers; None: the weight is stored otherwise, or is a merge of several tensors.
        """
        found, reader = self._schemes.find(canonical, depth), self._reader
        if found is None or not found.is_whole or found.scheme != scheme or not isinstance(reader, IntegerSource):
            return None
        if self._is_padded(canonical, depth):
            return None
        return reader.read_rounded(found.name)

    def _merged(self, merge: Merge, dtype: torch.dtype) -> Tensor:
        wide, found = torch.promote_types(dtype, torch.float32), None
        if merge.stored is not None:
            wide = torch.promote_types(self._reader.read(merge.stored).dtype, torch.float32)
            found = self._reader.read(merge.stored, wide)
        for names in merge.products:
            a, b = (self._reader.read(name, wide) for name in names)
            found = b @ a if found is None else torch.addmm(found, b, a)
        assert found is not None
        if merge.scale is not None:
            found = (found + merge.offset) * self._reader.read(merge.scale, wide) - merge.offset
        return found.to(dtype)

    def _neutral(self, canonical: str, dtype: torch.dtype) -> Tensor:
        """Returns a tensor of a part that adds zero: zeros for linears, neutral weights for norms."""
        value = torch.zeros(self._shapes[canonical], dtype=dtype)
        if canonical.endswith("_norm.weight"):
            value += 1.0 - self._blueprint.arch.norm.offset
        return value
