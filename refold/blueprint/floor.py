"""The floor of a model's bytes: embedding, head, norms and biases, which no fold, rank or drop makes smaller."""

from collections.abc import Mapping
from typing import NamedTuple

from refold.blueprint.integers import find_scheme
from refold.blueprint.quantisation import OUTER, is_quantised
from refold.blueprint.schema import Blueprint
from refold.blueprint.tensors import float_tensors

FLOAT_BYTES = 2
OUTER_SCHEMES = ("int8", "int4")


class ByteFloor(NamedTuple):
    """The bytes that stay, whatever is done to the layers.

    Attributes:
        outer_parameters: Parameters of the embedding and of an untied head.
        parameters: All parameters.
        outer_bytes: Bytes of embedding and head by scheme.
        kept_bytes: Bytes of norms, biases and other vectors at two bytes a number: nothing rounds them.
    """

    outer_parameters: int
    parameters: int
    outer_bytes: Mapping[str, int]
    kept_bytes: int

    @property
    def outer_share(self) -> float:
        """Share of embedding and head in all parameters."""
        return self.outer_parameters / self.parameters


def find_floor(blueprint: Blueprint) -> ByteFloor:
    """Counts the bytes outside of the layers.

    Args:
        blueprint: A stack; of a source, its identity.
    """
    tensors = list(float_tensors(blueprint))
    outer = [each for each in tensors if each.kind.place in OUTER]
    kept = [each for each in tensors if each.kind.place not in OUTER and not is_quantised(blueprint, each)]
    return ByteFloor(
        outer_parameters=sum(each.num_elements for each in outer),
        parameters=sum(each.num_elements for each in tensors),
        outer_bytes={
            name: sum(find_scheme(name).num_bytes(each.shape[0], each.shape[1]) for each in outer)
            for name in OUTER_SCHEMES
        },
        kept_bytes=FLOAT_BYTES * sum(each.num_elements for each in kept),
    )
