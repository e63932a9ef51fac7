"""Fits of depths in sequence: each depth is fitted on the residual stream that the folded depths before it produce."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn

from refold.blueprint.kinds import TargetTensor
from refold.blueprint.schema import Blueprint, Pool, depth_linears, part_linears
from refold.blueprint.tensors import float_tensors
from refold.calibration.curves import LinearSources, linear_sources
from refold.calibration.layers import SourceLayer, SourceLayers, Watch, reach_input
from refold.calibration.weighting import Drift, aimed_weight, drift_between
from refold.checkpoint.tensor_file import write_tensors
from refold.conversion.starts.group import LinearGroup
from refold.conversion.target_tensors import TargetBuilder, stored_name
from refold.data.packing import PackedSequence
from refold.modeling.configuration import RefoldConfig
from refold.modeling.depth import KeyValues
from refold.modeling.stack import RefoldModel
from refold.nn.factored import BasisLinear, FactoredLinear
from refold.nn.rotary import Rotary
from refold.planning.plan import Plan


class TargetStack:
    """A folded model in float32 that holds only the tensors of the depth that runs.

    Args:
        blueprint: The folded model.
        positions: Position of every token within its document.
        device: Device that runs depths; results come back to the CPU.
        rows_at_once: Number of sequences that a depth runs at once.

    Attributes:
        rows: Slices of sequences that run together.
    """

    def __init__(self, blueprint: Blueprint, positions: Int[Tensor, "B T"], device: str = "cpu", rows_at_once: int = 4):
        self._blueprint, self._positions, self._device = blueprint, positions, device
        self.rows = [slice(first, first + rows_at_once) for first in range(0, len(positions), rows_at_once)]
        # Keys and values that later depths read, for each slice of rows.
        self._shared: list[KeyValues] = [{} for _ in self.rows]
        # Embedding and head are not used.
        small = blueprint.arch.model_copy(update={"vocab_size": 1})
        config = RefoldConfig(blueprint=blueprint.model_copy(update={"arch": small}).model_dump(mode="json"))
        with torch.device("meta"):
            self._model = RefoldModel(config).eval()
        for rotary in self._model.rotaries:
            cast("Rotary", rotary.to_empty(device=device)).reset()

    def put(self, name: str, value: Tensor) -> None:
        """Sets a tensor of the folded model."""
        owner, kind = self._place(name)
        setattr(owner, kind, nn.Parameter(value.float().to(self._device), requires_grad=False))

    def take_out(self, names: Iterable[str]) -> None:
        """Frees tensors."""
        for name in names:
            owner, kind = self._place(name)
            setattr(owner, kind, nn.Parameter(getattr(owner, kind).to("meta"), requires_grad=False))

    @torch.no_grad()
    def input_of(
        self, depth: int, linear: str, rows: slice, hidden_states: Float[Tensor, "B T D"]
    ) -> Float[Tensor, "B T in"]:
        """Returns the input of a linear at a depth, on the device; modules after the linear need no tensors.

        Args:
            depth: Index of the depth.
            linear: `q_proj`, `down_proj`, ...
            rows: One of `rows`.
            hidden_states: Residual stream of these rows before the depth.
        """
        found = next(part.get_submodule(linear) for part in self._parts(depth) if hasattr(part, linear))
        return reach_input(found, lambda: self._run(depth, rows, hidden_states))

    @torch.no_grad()
    def run(
        self, depth: int, hidden_states: Float[Tensor, "B T D"], watch: Watch | None = None
    ) -> Float[Tensor, "B T D"]:
        """Returns the residual stream after a depth.

        Args:
            depth: Index of the depth.
            hidden_states: The residual stream before it.
            watch: Called with the depth, the name and the inputs of each linear, some sequences at a time.
        """
        hooks = [] if watch is None else self._watch(depth, watch)
        try:
            return torch.cat([self._run(depth, rows, hidden_states[rows]).cpu() for rows in self.rows])
        finally:
            for hook in hooks:
                hook.remove()

    def _watch(self, depth: int, watch: Watch) -> list[torch.utils.hooks.RemovableHandle]:
        def tell(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, inputs: watch(depth, name, inputs[0])

        kinds = (nn.Linear, FactoredLinear, BasisLinear)
        return [
            module.register_forward_pre_hook(tell(name))
            for part in self._parts(depth)
            for name, module in part.named_children()
            if isinstance(module, kinds)
        ]

    def _parts(self, depth: int) -> list[nn.Module]:
        spec = self._blueprint.depths[depth]
        parts = [] if spec.mixer is None else [self._model.mixers[spec.mixer]]
        return [*parts, *([] if spec.mlp is None else [self._model.mlps[spec.mlp]])]

    def _run(self, depth: int, rows: slice, hidden_states: Tensor) -> Tensor:
        states = hidden_states.to(self._device)
        batch = self._model.batch(states, position_ids=self._positions[rows].to(self._device))
        place = self.rows.index(rows)
        ran = self._model.run(range(depth, depth + 1), states, batch, shared=self._shared[place])
        self._shared[place] = ran.shared
        return ran.hidden_states

    def _place(self, name: str) -> tuple[nn.Module, str]:
        owner, _, kind = name.removeprefix("model.").rpartition(".")
        return self._model.get_submodule(owner), kind


def depth_tensors(blueprint: Blueprint, index: int) -> list[TargetTensor]:
    """Returns the tensors that a depth runs: its own and those of its stored parts."""
    depth = blueprint.depths[index]
    return [
        tensor
        for tensor in float_tensors(blueprint)
        if tensor.kind.place == "stack"
        and (tensor.depth == index or (tensor.pool and tensor.part == getattr(depth, tensor.pool)))
        and (tensor.depth is not None or tensor.part is not None)
    ]


class FittedTensors(Mapping[str, Tensor]):
    """Finished tensors of a folded model by name; most of them are on disk and read anew each time.

    Args:
        folder: An existing folder for the tensors on disk.
        given: Tensors in memory.
    """

    def __init__(self, folder: Path, given: Mapping[str, Tensor] | None = None):
        self._folder, self._given = folder, dict(given or {})
        self._paths: dict[str, Path] = {}

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors to the file of a key; a later tensor replaces an earlier one of the same name."""
        path = self._folder / f"{key}.safetensors"
        write_tensors(path, tensors, {})
        self._paths |= dict.fromkeys(tensors, path)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._paths:
            return self._given[name]
        with safe_open(self._paths[name], framework="pt") as file:
            return file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._paths or name in self._given

    def __iter__(self) -> Iterator[str]:
        return iter({**self._given, **self._paths})

    def __len__(self) -> int:
        return len({**self._given, **self._paths})


STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linears of attention and MLP that share an input, in the order in which they run."""


@dataclass(frozen=True)
class _Place:
    """A depth, and the residual streams of source and folded model before it."""

    depth: int
    layer: SourceLayer
    source: Tensor
    folded: Tensor
    positions: Tensor


class SequentialFitter:
    """Fits the linears of a plan from the first depth to the last, while source and folded model run side by side.

    A stored linear is fitted at the first depth that runs it, together with the LoRAs of all its depths. For this depth
    errors are weighted by the inputs in the folded model; for later depths, whose inputs are not known yet, by the
    inputs in the source. At each later depth the stored weight stays, and the depth's LoRA is fitted again with the
    inputs of that depth.

    Two residual streams and the weights of one layer and one depth are in memory at a time; fitted tensors are on disk.

    Args:
        plan: The conversion; its errors are weighted.
        layers: Layers of the source.
        builder: Builder of the target's tensors.
        fitted: The builder's finished tensors; the fits are written there.
        device: Device that runs depths.
    """

    def __init__(
        self, plan: Plan, layers: SourceLayers, builder: TargetBuilder, fitted: FittedTensors, device: str = "cpu"
    ):
        self._plan, self._layers, self._builder, self._device = plan, layers, builder, device
        self._fitted = fitted
        self._settled: set[str] = set()

    def run(self, sequences: PackedSequence, progress: Callable[[int], None] = lambda done: None) -> None:
        """Fits all linears.

        Args:
            sequences: Packed calibration tokens.
            progress: Called with the number of depths that are done.
        """
        blueprint = self._plan.blueprint
        stack = TargetStack(blueprint, sequences.position_ids, self._device)
        source = folded = self._layers.embed(sequences.input_ids)
        for index in range(blueprint.num_depths):
            layer = self._layers.load(blueprint.depths[index].source)
            place = _Place(index, layer, source, folded, sequences.position_ids)
            tensors = depth_tensors(blueprint, index)
            for tensor in tensors:
                if not tensor.kind.is_fitted:
                    stack.put(tensor.name, self._builder.make(tensor))
            for stage in self._stages(index):
                self._fit_stage(stage, place, stack)
                for tensor in tensors:
                    if tensor.kind.is_fitted and tensor.linear in stage:
                        stack.put(tensor.name, self._builder.make(tensor))
            source = layer.run(source, sequences.position_ids)
            folded = stack.run(index, folded)
            stack.take_out(tensor.name for tensor in tensors)
            progress(index + 1)

    def _stages(self, index: int) -> Iterator[tuple[str, ...]]:
        """Yields the linears of a depth that are fitted together, first those of new mixers, which have no moments."""
        names = list(depth_linears(self._plan.blueprint, index))
        native = {name for name in names if (found := self._sources(index, name)) is not None and found.is_native}
        stages = [tuple(name for name in names if name not in native)]
        stages += [tuple(name for name in stage if name in native) for stage in STAGES]
        return (stage for stage in stages if stage)

    def _sources(self, index: int, linear: str) -> LinearSources | None:
        blueprint = self._plan.blueprint
        mixer = blueprint.depths[index].mixer
        in_mixer = mixer is not None and linear in part_linears(blueprint, "mixer", mixer)
        pool: Pool = "mixer" if in_mixer else "mlp"
        part = getattr(blueprint.depths[index], pool)
        return linear_sources(blueprint, self._plan.starts, pool, part, linear)

    def _fit_stage(self, stage: tuple[str, ...], place: _Place, stack: TargetStack) -> None:
        ranks = self._plan.blueprint.depths[place.depth].ranks
        groups = [group for linear in stage if (group := self._sources(place.depth, linear)) is not None]
        groups = [group for group in groups if stored_name(group) not in self._settled or group.linear in ranks]
        if not groups:
            return
        seen = _compare_inputs(stage[0], place, stack) if groups[0].is_native else None
        for group in groups:
            given = self._builder.linear_group(group)
            if seen is not None:
                strength = self._builder.strength(group, place.depth)
                given = _aim(given, place.depth, seen, strength)
            self._fit(group, given, place.depth)

    def _fit(self, group: LinearSources, given: LinearGroup, depth: int) -> None:
        name = stored_name(group)
        if name in self._settled:
            self._relax(group, given, depth)
            return
        self._settled.add(name)
        if self._builder.is_fitted(group):
            self._fitted.write(name, dict(self._builder.fit(group, given)))
        elif group.is_native and group.sources == tuple(group.users.values()):
            # An untied linear keeps its target as weight: a copy would be best only for the inputs in the source.
            self._fitted.write(name, {f"{name}.weight": given.members[depth].weight.cpu()})

    def _relax(self, group: LinearSources, given: LinearGroup, depth: int) -> None:
        """Fits the LoRA of a later depth to the residual of the stored weight."""
        starts, name = self._plan.starts, stored_name(group)
        if starts.lora == "zero" or not group.is_native:
            return
        target, rank = given.members[depth].weight, given.members[depth].rank
        residual = target - self._stored(name, given).to(target.device)
        if not bool(torch.any(residual)):
            return
        found = given.weighting(depth).truncate(residual, rank, starts.svd, given.seed)
        self._builder.kept_energy[f"depths.{depth}.{group.linear}"] = round(found.kept, 6)
        a, b = found.factors()
        pair = f"model.depths.{depth}.lora.{group.linear}"
        self._fitted.write(pair, {f"{pair}.a": a.cpu(), f"{pair}.b": b.cpu()})

    def _stored(self, name: str, given: LinearGroup) -> Tensor:
        # Rounded as they are written, because LoRA pairs correct the rounding.
        if given.stored_rank is None:
            return given.round(self._fitted[f"{name}.weight"])
        if not given.stored_rank:
            return torch.zeros_like(next(iter(given.members.values())).weight, device="cpu")
        return given.round(self._fitted[f"{name}.b.weight"]) @ given.round(self._fitted[f"{name}.a.weight"])


def _compare_inputs(linear: str, place: _Place, stack: TargetStack) -> tuple[Drift, Drift]:
    """Compares the inputs of a linear in source and folded model, on each half of the sequences."""
    found: list[list[Drift]] = [[], []]
    for rows in stack.rows:
        theirs = place.layer.input_of(linear, place.source[rows], place.positions[rows])
        ours = stack.input_of(place.depth, linear, rows, place.folded[rows])
        for half, drifts in enumerate(found):
            if len(ours[half::2]):
                new = drift_between(theirs[half::2], ours[half::2])
                drifts[:] = [drifts[0] + new] if drifts else [new]
    return found[0][0], found[1][0]


def _aim(given: LinearGroup, depth: int, seen: tuple[Drift, Drift], strength: float) -> LinearGroup:
    """Sets the target of one depth to the weight that gives the source's outputs on the depth's inputs.

    Errors at this depth are weighted by the same inputs, their moment shrunk by the strength.
    """
    assert given.weightings is not None
    member = given.members[depth]
    aimed = replace(member, weight=aimed_weight(member.weight, seen))
    members = {**given.members, depth: aimed}
    is_shared = len(given.sources) == len(members)
    return replace(
        given,
        members=members,
        sources=tuple(each.weight for each in members.values()) if is_shared else given.sources,
        weightings=given.weightings.with_inputs(depth, (seen[0] + seen[1]).moment(strength)),
    )
