"""Schemes of the weights of a quantised model by canonical name and depth, and blocks that hold them; torch-free."""

from typing import NamedTuple

from refold.blueprint.integers import Scheme
from refold.blueprint.owned.registry import merge_at
from refold.blueprint.schema import Blueprint, Pool
from refold.blueprint.tensors import float_tensors

BLOCK = 32
"""Number of neighbours in a row (inputs) that share a scale in GGUF and in ONNX Runtime's MatMulNBits."""


def holds(bits: int, scheme: Scheme) -> bool:
    """Says whether blocks of 32 integers with a scale and without a zero point hold the numbers of a scheme exactly.

    Args:
        bits: Width of the integers of a block.
        scheme: The scheme. Groups must be whole blocks: all blocks of a group or row then have the same scale.
    """
    # The values of 2 bits are odd integers from -3 to 3 times half the scale.
    needed = 3 if scheme.bits == 2 else scheme.bits
    return not scheme.has_zero_point and needed <= bits and (scheme.group is None or scheme.group % BLOCK == 0)


class FoundWeight(NamedTuple):
    """How a model stores a weight at a depth.

    Attributes:
        name: Name of the stored tensor, or of the first factor where only factors are stored.
        is_whole: Whether the depth uses the stored tensor as it is: no LoRA, factor or gain is merged in.
        scheme: The scheme of the tensor; None: floats.
    """

    name: str
    is_whole: bool
    scheme: Scheme | None


class StoredSchemes:
    """Finds the stored tensors of canonical weights.

    Args:
        blueprint: The model's blueprint.
    """

    def __init__(self, blueprint: Blueprint):
        self._blueprint = blueprint
        self._schemes = {tensor.name: tensor.scheme(blueprint) for tensor in float_tensors(blueprint)}

    def find(self, canonical: str, depth: int | None) -> FoundWeight | None:
        """Returns how a weight is stored; None: the depth has no such part, or the weight is zero there.

        Args:
            canonical: Canonical name; outside the layers `embed_tokens.weight`, `norm.weight`, `lm_head.weight`, ...
            depth: The depth; None outside the layers.
        """
        if depth is None:
            name = canonical if canonical == "lm_head.weight" else f"model.{canonical}"
            return FoundWeight(name, True, self._schemes.get(name))
        pool: Pool = "mixer" if canonical.startswith("mixer.") else "mlp"
        merge = merge_at(self._blueprint, depth, pool, canonical.removeprefix(f"{pool}."))
        if merge is None or (merge.stored is None and not merge.products):
            return None
        name = merge.products[0][0] if merge.stored is None else merge.stored
        is_whole = merge.stored is not None and not merge.products and merge.scale is None
        return FoundWeight(name, is_whole, self._schemes.get(name))


def describe_wider(schemes: set[str], count: int, stored_bytes: int, held_bytes: int) -> str:
    """Returns the note about weights that keep their integers in blocks of more bits.

    Args:
        schemes: Names of the schemes.
        count: Number of tensors in the output.
        stored_bytes: Bytes of the tensors as the model stores them.
        held_bytes: Bytes of the tensors in the output.
    """
    return (
        f"{count} matrices that the model stores as {', '.join(sorted(schemes))} keep their numbers in wider integers, "
        f"in {held_bytes / stored_bytes:.1f} times the bytes: the format has no narrower ones"
    )


def describe_floats(schemes: set[str], count: int, stored_bytes: int, float_bytes: int) -> str:
    """Returns the note about weights whose scheme a format does not have.

    Args:
        schemes: Names of the schemes.
        count: Number of tensors in the output.
        stored_bytes: Bytes of the tensors as integers.
        float_bytes: Bytes of the tensors in the output.
    """
    return (
        f"{count} matrices that the model stores as {', '.join(sorted(schemes))} are written as floats, in "
        f"{float_bytes / stored_bytes:.1f} times the bytes: the format has no such integers"
    )
