"""Origins of tensors: how a target is initialised, and the source layers that each of its tensors is made from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from refold.blueprint.schema import Blueprint, Pool, users_of
from refold.families.arch import Frozen
from refold.mixers.spec import Carried

ErrorMetric = Literal["none", "activations", "fisher"]
"""The error metric for an error E of a linear's weight. `none`: the squared entries, |E|^2. `activations`: the squared
outputs on calibration text, |E S|^2 with S S^T the second moment of the inputs (SVD-LLM, arXiv 2403.07378). `fisher`:
the effect on the loss, for which outputs are weighted by the second moment of their gradients too (the
Kronecker-factored Fisher matrix of arXiv 1503.05671)."""

Align = Literal["none", "permutation", "rotation", "both"]
"""Symmetries by which tied layers are aligned: `permutation` of neurons and heads, `rotation` of each head's values."""


class Replacement(Frozen):
    """A linear map in place of a run of dropped parts, folded into the weights of the part before them."""

    pool: Pool
    """Pool of the part before the run."""
    layer: int
    """Source layer of the part before the run."""
    gone: tuple[tuple[int, Pool], ...]
    """Source layer and pool of each dropped part, in the order of the stack."""

    into: Literal["o_proj", "down_proj", "output_norm"]
    """The output projection of the part before the run, whose weight and bias take the map; or the norm behind that
    projection, which takes one factor for each channel."""

    @property
    def is_diagonal(self) -> bool:
        """Whether the map has one factor for each channel."""
        return self.into == "output_norm"

    def describe(self) -> str:
        """Returns the map in words, such as `attention of layer 4, folded into down_proj of layer 3`."""
        owner = f"{'attention' if self.pool == 'mixer' else 'MLP'} of " if self.is_diagonal else ""
        return f"{self.name(self.gone)}, folded into {self.into} of {owner}layer {self.layer}"

    @staticmethod
    def name(places: tuple[tuple[int, Pool], ...]) -> str:
        """Returns parts in words, such as `attention of layer 4, the MLP of layer 4`."""
        return ", ".join(f"{'attention' if pool == 'mixer' else 'the MLP'} of layer {layer}" for layer, pool in places)


OUTPUT_PROJECTIONS: Mapping[Pool, Literal["o_proj", "down_proj"]] = {"mixer": "o_proj", "mlp": "down_proj"}
"""The last linear of attention and of an MLP of a source."""


class Initialisation(Frozen):
    """Initialisation of all tensors of a target. Blueprint and initialisation together define a conversion."""

    weights: Literal["source", "fresh"] = "source"
    """`fresh`: every tensor of the target is initialised with new values, embeddings and head included."""
    lora: Literal["svd", "zero", "joint"] | None = None
    """Initialisation of LoRAs; None: the target has none."""
    svd: Literal["auto", "exact"] = "auto"
    weight: ErrorMetric = "none"
    """The error metric of fitted linears."""
    align: Align = "none"
    """Alignment of tied layers before they are averaged or fitted."""
    scale: Literal["none", "norm"] = "none"
    """`norm`: the mean of tied linears is scaled to the mean of their Frobenius norms."""
    transfers: tuple[tuple[str, ...] | None, ...] = ()
    """For each stored mixer the names of the linears taken over from its sources; None, or no entry: all."""
    replacements: tuple[Replacement, ...] = ()
    """Linear maps in place of dropped parts, fitted to calibration text."""
    seed: int = 0

    def transfers_of(self, part: int) -> tuple[str, ...] | None:
        """Returns the names of the linears that a stored mixer takes over; None: all."""
        return self.transfers[part] if part < len(self.transfers) else None


How = Literal["copied", "averaged", "fresh", "factorised", "joint"]


@dataclass(frozen=True)
class Origin:
    """The source layers and the method that a target tensor is initialised with.

    Attributes:
        how: `copied` from one layer (or from outside the layers); `averaged` over `layers`; `fresh`; `factorised`: by a
            truncated SVD (for a LoRA, of a residual); `joint`: fitted together with all tensors of the tied linear.
        canonical: Name of the source's canonical tensor, such as `mixer.q_proj.weight`. For a LoRA, the weight of its
            linear; for a gate, its own name in the exit.
        repeat: Number of times that each head of the source's tensor is repeated before any other step.
        layers: Source layers that are read. For `factorised`, the source layer of the depth; for `joint`, all layers
            tied to the part. Empty outside the layers and for `fresh`.
    """

    how: How
    canonical: str
    layers: tuple[int, ...] = ()
    repeat: int = 1


def carried_tensor(blueprint: Blueprint, starts: Initialisation, part: int, local: str) -> Carried | None:
    """Returns the source tensor that a tensor of a stored mixer is taken from; None for a fresh tensor.

    Args:
        blueprint: The target.
        starts: The initialisation of the target.
        part: Index of the stored mixer.
        local: The tensor's name in the mixer.
    """
    found = blueprint.mixers[part].mixer.carried(blueprint.part_arch("mixer", part)).get(local)
    if found is None or found.misfit:
        return None
    transfers = starts.transfers_of(part)
    return found if not found.group or transfers is None or found.group in transfers else None


def carry_over(
    blueprint: Blueprint, starts: Initialisation, pool: Pool, part: int, local: str
) -> tuple[Carried, tuple[int, ...]] | None:
    """Returns the source tensor and the source layers of a tensor of a part; None for a fresh tensor.

    Args:
        blueprint: The target.
        starts: The initialisation of the target.
        pool: The pool of the part.
        part: The index of the part.
        local: The tensor's name in the part, such as `q_proj.weight`.
    """
    carried = carried_tensor(blueprint, starts, part, local) if pool == "mixer" else Carried(f"{pool}.{local}")
    sources = sources_of(blueprint, pool, part, local)
    return None if carried is None or not sources or starts.weights == "fresh" else (carried, sources)


def averaged(carried: Carried, sources: tuple[int, ...]) -> Origin:
    """Returns the origin `averaged` for several source layers, and `copied` for a single one."""
    return Origin("copied" if len(sources) == 1 else "averaged", carried.canonical, sources, carried.repeat)


def is_mapped(starts: Initialisation, made: Origin) -> bool:
    """Says whether a linear map in place of dropped parts changes the source tensor that a tensor is made from."""
    pool, _, owner = made.canonical.rpartition(".")[0].partition(".")
    return any((each.pool, each.into) == (pool, owner) and made.layers == (each.layer,) for each in starts.replacements)


def is_relaxed(blueprint: Blueprint, pool: Pool, part: int, linear: str) -> bool:
    """Says whether any depth has a LoRA for a stored linear."""
    return any(linear in blueprint.depths[user].ranks for user in blueprint.users(pool, part))


def tied_layers(blueprint: Blueprint, pool: Pool, part: int, local: str) -> tuple[int, ...]:
    """Returns the source layers of all depths that use one tensor of a part, in the order of the depths."""
    return tuple(blueprint.depths[user].source for user in users_of(blueprint, pool, part, local))


def sources_of(blueprint: Blueprint, pool: Pool, part: int, local: str) -> tuple[int, ...]:
    """Returns the source layers that one tensor of a part is initialised from.

    A part with one source layer uses that layer. A mean over several layers takes only those whose depths use the
    tensor, or all of them if no such depth does.
    """
    sources = blueprint.pool(pool)[part].sources
    if len(sources) < 2:
        return sources
    used = set(tied_layers(blueprint, pool, part, local))
    return tuple(layer for layer in sources if layer in used) or sources


def describe_weighting(starts: Initialisation) -> str:
    """Returns the last words of a plan line's reason, which name the error metric; empty for the metric `none`."""
    return "" if starts.weight == "none" else f", weighted by {starts.weight}"


def describe_svd(of: str, starts: Initialisation) -> str:
    """Returns the reason of a plan line for factors computed by a truncated SVD."""
    return f"truncated SVD of {of}{describe_weighting(starts)} (svd: {starts.svd})"
