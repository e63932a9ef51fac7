"""The lines of a plan, one for each group of tensors with the same origin, and the plan's comparison of memory."""

import re
from collections.abc import Iterator, Mapping
from typing import Literal

from refold.blueprint.cost import Cost, smaller_from
from refold.blueprint.kinds import TargetTensor
from refold.blueprint.origins import Initialisation, Origin, carried_tensor, is_mapped
from refold.blueprint.schema import Blueprint, idle_names
from refold.blueprint.source_tensors import SourceTensor, locate_piece
from refold.blueprint.tensors import float_tensors
from refold.families.arch import Family, Frozen
from refold.planning.approximation import LEARNED

LineKind = Literal[
    "copied", "averaged", "split", "repeated", "fresh", "factorised", "joint", "mapped", "dropped", "ignored"
]  # fmt: skip
MAPPED = "times the linear map in place of dropped parts"
_INDEX = re.compile(r"\.\d+\.")


class PlanLine(Frozen):
    """A group of tensors with the same origin."""

    tensors: str
    """Name in the target with `*` for the index. For `dropped` and `ignored` tensors, the name in the source."""
    how: LineKind
    count: int
    """Number of tensors."""
    layers: tuple[int, ...] = ()
    """Source layers that are read, or dropped."""
    reason: str = ""


class _Lines:
    """Collects tensors into lines, in the order of the first tensor of each group."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, LineKind, str], tuple[int, set[int]]] = {}

    def add(self, tensors: str, how: LineKind, reason: str, layers: tuple[int, ...] = ()) -> None:
        count, seen = self._groups.get((tensors, how, reason), (0, set()))
        self._groups[tensors, how, reason] = (count + 1, seen | set(layers))

    def __iter__(self) -> Iterator[PlanLine]:
        for (tensors, how, reason), (count, layers) in self._groups.items():
            yield PlanLine(tensors=tensors, how=how, count=count, layers=tuple(sorted(layers)), reason=reason)


def plan_lines(
    blueprint: Blueprint,
    starts: Initialisation,
    family: Family,
    expected: Mapping[str, SourceTensor],
    ignored: Mapping[str, tuple[str, str]],
) -> tuple[PlanLine, ...]:
    """Returns a line for each group of target tensors, then for each group of unused source tensors.

    Args:
        blueprint: The target.
        starts: The initialisation of the target.
        family: The family of the source.
        expected: The tensors of the source, from `source_tensors`.
        ignored: Further tensors of the source: name to pattern and reason.
    """
    lines = _Lines()
    used: set[tuple[str, int | None]] = set()
    for tensor in float_tensors(blueprint):
        made = tensor.origin(blueprint, starts)
        if made.how != "fresh":
            used |= {(made.canonical, layer) for layer in made.layers or (None,)}
        how, reason = _explain(made, tensor, blueprint, starts, family)
        if is_mapped(starts, made):
            how, reason = ("mapped" if how == "copied" else how), "; ".join(filter(None, (reason, MAPPED)))
        lines.add(_INDEX.sub(".*.", tensor.kind.line_name(tensor)), how, reason, made.layers)
    for tensor in expected.values():
        if not any((piece, tensor.layer) in used for piece in tensor.rule.pieces):
            reason = _why_unused(blueprint, starts, tensor)
            layers = () if tensor.layer is None else (tensor.layer,)
            lines.add(tensor.rule.source.replace("{layer}", "*"), "dropped", reason, layers)
    for pattern, reason in ignored.values():
        lines.add(pattern, "ignored", reason)
    return tuple(lines)


def _explain(
    made: Origin, tensor: TargetTensor, blueprint: Blueprint, starts: Initialisation, family: Family
) -> tuple[LineKind, str]:
    reason = tensor.kind.explain(made, blueprint, starts, tensor)
    if reason is not None:
        return made.how, reason
    if made.how == "fresh":
        return "fresh", _why_fresh(blueprint, starts, tensor)
    if made.repeat > 1:
        each = f"each key-value head {made.repeat} times"
        return ("repeated", each) if made.how == "copied" else ("averaged", f"{each} first")
    fused = locate_piece(family, made.canonical, made.layers[0] if made.layers else None).rule
    if fused.layout != "whole":
        name = fused.source.rsplit(".", 2)[-2]
        return ("split", f"split from {name}") if made.how == "copied" else ("averaged", f"split from {name} first")
    return made.how, ""


def _why_fresh(blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> str:
    if starts.weights == "fresh":
        return "weights: fresh"
    assert tensor.pool is not None
    part = tensor.part_in(blueprint)
    if not blueprint.pool(tensor.pool)[part].sources:
        by_choice = tensor.pool == "mlp" and any(transfers is not None for transfers in starts.transfers)
        return "not named in transfer" if by_choice else "fold.init: random"
    mixer = blueprint.mixers[part].mixer
    carried = mixer.carried(blueprint.arch).get(tensor.local)
    if tensor.local in LEARNED and mixer.softmax_fit not in (None, "none"):
        return f"fitted to the source's attention ({mixer.softmax_fit})"
    if carried is None:
        return f"new in {mixer.type}"
    return f"not named in transfer{f', and does not fit: {carried.misfit}' if carried.misfit else ''}"


def _only_makes_keys(blueprint: Blueprint, tensor: SourceTensor) -> bool:
    """Says whether a source tensor only serves keys and values that its depth reads from another depth."""
    names = {piece.partition(".")[2].split(".")[0] for piece in tensor.rule.pieces}
    depths = [index for index, depth in enumerate(blueprint.depths) if depth.source == tensor.layer]
    return all(names <= idle_names(blueprint, index) for index in depths)


def _why_unused(blueprint: Blueprint, starts: Initialisation, tensor: SourceTensor) -> str:
    if starts.weights == "fresh":
        return "weights: fresh"
    depths = [depth for depth in blueprint.depths if depth.source == tensor.layer]
    if all(depth.mixer is None and depth.mlp is None for depth in depths):
        return "layer dropped"
    pool = tensor.rule.pieces[0].split(".")[0]
    if all(getattr(depth, pool) is None for depth in depths):
        return "attention dropped" if pool == "mixer" else "MLP dropped"
    if pool == "mixer" and (depth := next((each for each in depths if each.mixer is not None), None)) is not None:
        assert depth.mixer is not None
        mixer = blueprint.mixers[depth.mixer].mixer.type
        pieces = [piece.removeprefix("mixer.") for piece in tensor.rule.pieces]
        if all(carried_tensor(blueprint, starts, depth.mixer, piece) is None for piece in pieces):
            return f"not carried over to {mixer}"
    if _only_makes_keys(blueprint, tensor):
        return "keys and values are read from another depth"
    if pool == "mlp" and any(depth.mlp is not None and not blueprint.mlps[depth.mlp].sources for depth in depths):
        return "not carried over: the MLP is fresh"
    return "tied: the stored layer is initialised from other layers"


MEMORY_CONTEXTS = (1_024, 32_768, 1_048_576)


class ContextMemory(Frozen):
    """Bytes of cache and state of one sequence."""

    context: int
    source: int
    target: int


class MemoryNeeds(Frozen):
    """Cache and state of source and target, and the context length from which on the target needs less memory."""

    cache_and_state: tuple[ContextMemory, ...]
    smaller_from: int | None
    """Context length from which on weights, cache and state of the target need less memory than those of the source. 0:
    at every length; None: never."""

    def describe(self) -> str:
        """Returns `smaller_from` in words, such as `from 1,234 tokens on`."""
        if self.smaller_from is None:
            return "never"
        return f"from {self.smaller_from:,} tokens on" if self.smaller_from else "at every length"


def compare_memory(source: Cost, target: Cost) -> MemoryNeeds:
    """Compares the memory of a source and its target."""
    return MemoryNeeds(
        cache_and_state=tuple(
            ContextMemory(context=each, source=source.cache_bytes(each), target=target.cache_bytes(each))
            for each in MEMORY_CONTEXTS
        ),
        smaller_from=smaller_from(source, target),
    )
