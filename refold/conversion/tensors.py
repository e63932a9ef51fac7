"""Every tensor of a target, computed from the source a few matrices at a time."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from refold.blueprint.origins import origin, part_of
from refold.blueprint.tensors import TargetTensor, target_tensors
from refold.conversion.fresh import fill_of, fresh_tensor, tensor_seed
from refold.conversion.plan import Plan
from refold.conversion.starts.group import FittedBasis, LinearGroup, Member
from refold.conversion.starts.registry import fit
from refold.measuring.curves import LinearSources, linear_sources, read_weightings
from refold.measuring.moments import MomentStore
from refold.measuring.pieces import PieceReader

FITTED_ROLES = ("linear", "factor_a", "factor_b", "coefficients", "lora_a", "lora_b")


class TargetBuilder:
    """Computes a plan's target tensor by tensor.

    Residuals, means and decompositions are float32 from the source's own weights; what is only copied stays as it is.

    Args:
        plan: The conversion.
        pieces: Reads the source's weights.
        dtype: Of the target.
        device: Where linears are fitted.
        fitted: Tensors that are there already, by name.
        store: Moments that errors are weighed by, where the plan weighs them.

    Attributes:
        kept_energy: After `build`, by `depths.<d>.<linear>`: the share of what tying lost that the LoRA holds.
    """

    def __init__(
        self,
        plan: Plan,
        pieces: PieceReader,
        dtype: torch.dtype,
        device: str = "cpu",
        fitted: Mapping[str, Tensor] | None = None,
        store: MomentStore | None = None,
    ):
        self._plan, self._pieces, self._dtype, self._device = plan, pieces, dtype, device
        self._fitted, self._store = fitted or {}, store
        self.kept_energy: dict[str, float] = {}

    def build(self) -> Iterator[tuple[str, Tensor]]:
        """Yields name and value of every target tensor once, in the dtype of the target."""
        blueprint, starts = self._plan.blueprint, self._plan.starts
        fitted: set[str] = set()
        for tensor in target_tensors(blueprint):
            if tensor.name in fitted:
                continue
            if tensor.name in self._fitted:
                yield tensor.name, self._fitted[tensor.name].to(self._dtype)
                continue
            group = self._group_of(tensor)
            made = origin(blueprint, starts, tensor)
            if group is not None:
                for name, value in self._fit(group):
                    fitted.add(name)
                    yield name, value.to(self._dtype)
            elif made.how == "fresh":
                fresh = fresh_tensor(tensor, blueprint.arch, starts.seed, fill_of(blueprint, tensor))
                yield tensor.name, fresh.to(self._dtype)
            elif made.how == "averaged":
                layers = [self._pieces.read(made.canonical, layer, torch.float32, made.repeat) for layer in made.layers]
                yield tensor.name, torch.stack(layers).mean(dim=0).to(self._dtype)
            else:
                layer = made.layers[0] if made.layers else None
                yield tensor.name, self._pieces.read(made.canonical, layer, self._dtype, made.repeat)

    def _group_of(self, tensor: TargetTensor) -> LinearSources | None:
        """The stored linear that a tensor is fitted with; None where it is only copied, averaged or fresh."""
        if tensor.role not in FITTED_ROLES:
            return None
        blueprint = self._plan.blueprint
        assert tensor.pool is not None
        part = part_of(blueprint, tensor)
        group = linear_sources(blueprint, self._plan.starts, tensor.pool, part, tensor.linear)
        if group is None:
            return None
        is_tied = len(group.users) > 1 and self._store is not None and group.is_native
        relaxed = any(tensor.linear in blueprint.depths[depth].ranks for depth in group.users)
        kept = blueprint.pool(group.pool)[group.part]
        is_factored = tensor.linear in kept.factors or tensor.linear in kept.bases
        # A weighted mean is fitted too, where stored weights start from all layers tied to them.
        return group if relaxed or is_factored or (is_tied and len(group.sources) == len(group.users)) else None

    def _fit(self, group: LinearSources) -> Iterator[tuple[str, Tensor]]:
        blueprint, starts = self._plan.blueprint, self._plan.starts
        wanted = dict.fromkeys((*group.sources, *group.users.values()))
        weights = {
            layer: self._pieces.read(group.carried.canonical, layer, torch.float32, group.carried.repeat).to(
                self._device
            )
            for layer in wanted
        }
        prefix, kept = f"model.{group.pool}s.{group.part}.{group.linear}", blueprint.pool(group.pool)[group.part]
        weightings = None
        if self._store is not None and group.is_native:
            weightings = read_weightings(starts.weight, group, self._store, self._device)
        found = fit(
            LinearGroup(
                sources=tuple(weights[layer] for layer in group.sources),
                members={
                    depth: Member(weights[layer], blueprint.depths[depth].ranks.get(group.linear, 0))
                    for depth, layer in group.users.items()
                },
                weightings=weightings,
                stored_rank=kept.factors.get(group.linear),
                basis_rank=kept.bases.get(group.linear),
                seed=tensor_seed(starts.seed, f"{prefix}.weight") % 2**31,
            ),
            starts.lora or "svd",
            starts.svd,
        )
        if isinstance(found, FittedBasis):
            yield f"{prefix}.a.weight", found.a.cpu()
            for depth, coefficients in found.coefficients.items():
                yield f"model.depths.{depth}.coefficients.{group.linear}", coefficients.cpu()
        elif found.stored.factors is None:
            yield f"{prefix}.weight", found.stored.weight.cpu()
        elif found.stored.factors:
            a, b = found.stored.factors
            yield f"{prefix}.a.weight", a.cpu()
            yield f"{prefix}.b.weight", b.cpu()
        for depth, (a, b) in found.pairs.items():
            self.kept_energy[f"depths.{depth}.{group.linear}"] = round(found.kept[depth], 6)
            yield f"model.depths.{depth}.lora.{group.linear}.a", a.cpu()
            yield f"model.depths.{depth}.lora.{group.linear}.b", b.cpu()
