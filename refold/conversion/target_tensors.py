"""Builds each tensor of a folded model: copied, averaged or fitted from the source, or freshly initialised."""

import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from refold.blueprint.kinds import TargetTensor
from refold.blueprint.tensors import float_tensors
from refold.calibration.curves import LinearSources, linear_sources, read_weightings
from refold.calibration.moments import MomentStore
from refold.conversion.starts.group import FittedBasis, LinearGroup, Member
from refold.conversion.starts.registry import fit
from refold.errors import SourceError
from refold.mixers.spec import Fill
from refold.nn.fills import make_fill
from refold.planning.plan import Plan
from refold.sources.pieces import PieceReader


def tensor_seed(seed: int, name: str) -> int:
    """Returns the seed of one tensor, so that values do not depend on the order of writing."""
    return seed * 1_000_003 + zlib.crc32(name.encode())


def fresh_tensor(tensor: TargetTensor, fill: Fill, seed: int) -> Tensor:
    """Returns the float32 values of a freshly initialised tensor.

    Args:
        tensor: Name and shape.
        fill: The result of `tensor.fill(blueprint)`.
        seed: The conversion's seed.
    """
    # Random features estimate exp(q . k) only where queries and keys have the same directions.
    name = tensor.name.replace("q_map.", "k_map.")
    return make_fill(fill, tensor.shape, torch.Generator().manual_seed(tensor_seed(seed, name)))


class TargetBuilder:
    """Computes the tensors of a folded model one by one.

    Residuals, means and decompositions are computed in float32 from the source's own weights; copies are exact.

    Args:
        plan: The conversion.
        pieces: Reader of the source's weights.
        dtype: Dtype of the folded model.
        device: Device that fits linears.
        fitted: Finished tensors by name.
        store: Moments that errors are weighted by; None where the plan does not weight errors.

    Attributes:
        kept_energy: After `build`, the share of the residual's energy that each LoRA keeps, by
            `depths.<d>.<linear>`.
        factor_energy: After `build`, the share of a weight's energy that its stored factors hold, by
            `mixers.<p>.<linear>` or `mlps.<p>.<linear>`.
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
        self._fitted: Mapping[str, Tensor] = {} if fitted is None else fitted
        self._store = store
        self.kept_energy: dict[str, float] = {}
        self.factor_energy: dict[str, float] = {}

    def build(self) -> Iterator[tuple[str, Tensor]]:
        """Yields name and value of every tensor once, in the dtype of the folded model."""
        fitted: set[str] = set()
        for tensor in float_tensors(self._plan.blueprint):
            if tensor.name in fitted:
                continue
            group = None if tensor.name in self._fitted else self._group_of(tensor)
            if group is not None:
                for name, value in self.fit(group, self.linear_group(group)):
                    fitted.add(name)
                    yield name, value.to(self._dtype)
            else:
                yield tensor.name, self.make(tensor)

    def make(self, tensor: TargetTensor) -> Tensor:
        """Returns a tensor that is finished, fresh, averaged or copied, in the dtype of the folded model."""
        if tensor.name in self._fitted:
            return self._fitted[tensor.name].to(self._dtype)
        blueprint, starts = self._plan.blueprint, self._plan.starts
        made = tensor.origin(blueprint, starts)
        if made.how == "fresh":
            return fresh_tensor(tensor, tensor.fill(blueprint), starts.seed).to(self._dtype)
        if made.how == "averaged":
            layers = [self._pieces.read(made.canonical, layer, torch.float32, made.repeat) for layer in made.layers]
            is_scaled = starts.scale == "norm" and tensor.kind.is_fitted
            return (norm_matched(layers) if is_scaled else torch.stack(layers).mean(dim=0)).to(self._dtype)
        layer = made.layers[0] if made.layers else None
        return self._pieces.read(made.canonical, layer, self._dtype, made.repeat)

    def _group_of(self, tensor: TargetTensor) -> LinearSources | None:
        """Returns the stored linear that a tensor is fitted with; None for a copied, averaged or fresh tensor."""
        if not tensor.kind.is_fitted:
            return None
        blueprint = self._plan.blueprint
        assert tensor.pool is not None
        part = tensor.part_in(blueprint)
        group = linear_sources(blueprint, self._plan.starts, tensor.pool, part, tensor.linear)
        return group if group is not None and self.is_fitted(group) else None

    def is_fitted(self, group: LinearSources) -> bool:
        """Tells whether a stored linear is fitted, not only copied or averaged."""
        blueprint = self._plan.blueprint
        is_tied = len(group.users) > 1 and self._store is not None and group.is_native
        relaxed = any(group.linear in blueprint.depths[depth].ranks for depth in group.users)
        kept = blueprint.pool(group.pool)[group.part]
        is_factored = group.linear in kept.factors or group.linear in kept.bases
        # A weighted mean counts as a fit, if the stored weight is made from all layers that are tied to it.
        return relaxed or is_factored or (is_tied and len(group.sources) == len(group.users))

    def strength(self, group: LinearSources, depth: int) -> float:
        """Returns the strength by which moments of a stored linear's inputs at a depth shrink."""
        if self._store is None or self._store.shrinkage is None:
            return 0.0
        return self._store.shrinkage.of(group.users[depth], group.linear)

    def linear_group(self, group: LinearSources) -> LinearGroup:
        """Reads the weights and moments that a stored linear is fitted from."""
        blueprint, starts = self._plan.blueprint, self._plan.starts
        wanted = dict.fromkeys((*group.sources, *group.users.values()))
        weights = {
            layer: self._pieces.read(group.carried.canonical, layer, torch.float32, group.carried.repeat).to(
                self._device
            )
            for layer in wanted
        }
        weightings, kept = None, blueprint.pool(group.pool)[group.part]
        if self._store is not None and group.is_native:
            weightings = read_weightings(starts.weight, group, self._store, self._device)
        sources = tuple(weights[layer] for layer in group.sources)
        if starts.scale == "norm" and len(sources) > 1:
            sources = (norm_matched(sources),)
        return LinearGroup(
            sources=sources,
            members={
                depth: Member(weights[layer], blueprint.depths[depth].ranks.get(group.linear, 0))
                for depth, layer in group.users.items()
            },
            weightings=weightings,
            stored_rank=kept.factors.get(group.linear),
            basis_rank=kept.bases.get(group.linear),
            dtype=self._dtype,
            seed=tensor_seed(starts.seed, f"{stored_name(group)}.weight") % 2**31,
        )

    def fit(self, group: LinearSources, given: LinearGroup) -> Iterator[tuple[str, Tensor]]:
        """Yields name and float32 value of every tensor of a stored linear and its LoRAs, fitted together."""
        starts, prefix = self._plan.starts, stored_name(group)
        try:
            found = fit(given, starts.lora or "svd", starts.svd)
        except torch.linalg.LinAlgError as error:
            reason = str(error).partition("\n")[0][:100]
            raise SourceError(
                f"{prefix}: weights with finite squares are required ({reason}); the source's numbers are too large"
            ) from error
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
            self.factor_energy[prefix.removeprefix("model.")] = round(found.stored.kept, 6)
        for depth, (a, b) in found.pairs.items():
            self.kept_energy[f"depths.{depth}.{group.linear}"] = round(found.kept[depth], 6)
            yield f"model.depths.{depth}.lora.{group.linear}.a", a.cpu()
            yield f"model.depths.{depth}.lora.{group.linear}.b", b.cpu()


def norm_matched(weights: Sequence[Tensor]) -> Tensor:
    """Returns the mean of matrices, scaled to the mean of their Frobenius norms."""
    stacked = torch.stack(list(weights))
    mean, norm = stacked.mean(dim=0), torch.linalg.matrix_norm(stacked).mean()
    return mean * (norm / torch.linalg.matrix_norm(mean).clamp(min=torch.finfo(mean.dtype).tiny))


def stored_name(group: LinearSources) -> str:
    """Returns the prefix of the names of a stored linear's tensors."""
    return f"model.{group.pool}s.{group.part}.{group.linear}"
