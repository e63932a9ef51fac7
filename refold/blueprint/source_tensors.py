"""The tensors that a source checkpoint must have, and the place of each canonical tensor in them."""

from dataclasses import dataclass
from typing import NamedTuple

from refold.families.arch import ArchSpec, Family, TensorRule
from refold.mixers.attention import Attention
from refold.mixers.spec import MLP, PartSpec, Shape, norm_vectors


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a source checkpoint.

    Attributes:
        name: Name in the checkpoint, such as `model.layers.3.self_attn.q_proj.weight`.
        shape: Required shape.
        rule: The canonical tensors inside.
        layer: Index of its layer; None outside the layers.
    """

    name: str
    shape: Shape
    rule: TensorRule
    layer: int | None


class SourcePiece(NamedTuple):
    """The place of a canonical tensor: piece number `index` of the checkpoint's tensor `name`, packed as in `rule`."""

    name: str
    rule: TensorRule
    index: int


def canonical_tensors(arch: ArchSpec) -> dict[str, Shape]:
    """Returns name and shape of all canonical tensors: outside the layers, then those of one layer."""
    table = (arch.vocab_size, arch.hidden_size)
    found: dict[str, Shape] = {"embed_tokens.weight": table, **norm_vectors("norm", arch.norm, arch.hidden_size)}
    if not arch.tied_head:
        found["lm_head.weight"] = table
    parts: dict[str, PartSpec] = {"mixer": Attention(), "mlp": MLP}
    for pool, part in parts.items():
        found |= {f"{pool}.{name}": shape for name, shape in part.vectors(arch).items()}
        found |= {f"{pool}.{name}.weight": shape for name, shape in part.linears(arch).items()}
    return found


def source_tensors(arch: ArchSpec, family: Family) -> dict[str, SourceTensor]:
    """Returns all tensors that a checkpoint of an architecture must have, by name."""
    canonical = canonical_tensors(arch)
    found: dict[str, SourceTensor] = {}
    for rule in family.rules:
        shapes = [canonical[piece] for piece in rule.pieces if piece in canonical]
        if not shapes:
            continue
        assert len(shapes) == len(rule.pieces), f"{rule.source}: only some of its pieces exist"
        shape = (sum(each[0] for each in shapes), *shapes[0][1:])
        for layer in range(arch.num_layers) if rule.per_layer else (None,):
            name = rule.source.format(layer=layer)
            found[name] = SourceTensor(name, shape, rule, layer)
    return found


def locate_piece(family: Family, canonical: str, layer: int | None = None) -> SourcePiece:
    """Finds a canonical tensor in a family's checkpoints.

    Args:
        family: The family.
        canonical: `mixer.q_proj.weight`, `mlp.input_norm.weight`, `embed_tokens.weight`, ...
        layer: The source layer; None outside the layers.
    """
    for rule in family.rules:
        if canonical in rule.pieces:
            assert rule.per_layer == (layer is not None), f"{canonical}: layer {layer}"
            return SourcePiece(rule.source.format(layer=layer), rule, rule.pieces.index(canonical))
    raise KeyError(f"{family.model_type} has no {canonical}")
