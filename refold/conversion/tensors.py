"""Every tensor of a target, computed from the source a few matrices at a time."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from refold.blueprint.contents import users_of
from refold.blueprint.origins import Origin, origin, sources_of
from refold.blueprint.tensors import TargetTensor, target_tensors
from refold.conversion.fresh import fill_of, fresh_tensor, tensor_seed
from refold.conversion.pieces import PieceReader
from refold.conversion.plan import Plan
from refold.conversion.starts.group import LinearGroup, Member
from refold.conversion.starts.registry import STARTS


class TargetBuilder:
    """Computes a plan's target tensor by tensor.

    Residuals, means and decompositions are float32 from the source's own weights; what is only copied stays as it is.

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
    ):
        self._plan, self._pieces, self._dtype, self._device = plan, pieces, dtype, device
        self._fitted = fitted or {}
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
            made = origin(blueprint, starts, tensor)
            if tensor.role == "linear" and made.how != "fresh" and any(self._users(tensor).values()):
                for name, value in self._fit(tensor, made):
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

    def _users(self, tensor: TargetTensor) -> dict[int, int]:
        """Depth to LoRA rank of those that run a stored linear."""
        assert tensor.pool is not None
        assert tensor.part is not None
        linear = tensor.local.removesuffix(".weight")
        blueprint = self._plan.blueprint
        users = users_of(blueprint, tensor.pool, tensor.part, tensor.local)
        return {depth: blueprint.depths[depth].ranks.get(linear, 0) for depth in users}

    def _fit(self, tensor: TargetTensor, made: Origin) -> Iterator[tuple[str, Tensor]]:
        blueprint, starts = self._plan.blueprint, self._plan.starts
        assert tensor.pool is not None
        assert tensor.part is not None
        assert starts.lora is not None
        linear = tensor.local.removesuffix(".weight")
        users = self._users(tensor)
        sources = sources_of(blueprint, tensor.pool, tensor.part, tensor.local)
        wanted = dict.fromkeys((*sources, *(blueprint.depths[depth].source for depth in users)))
        weights = {
            layer: self._pieces.read(made.canonical, layer, torch.float32, made.repeat).to(self._device)
            for layer in wanted
        }
        group = LinearGroup(
            sources=tuple(weights[layer] for layer in sources),
            members={depth: Member(weights[blueprint.depths[depth].source], rank) for depth, rank in users.items()},
            seed=tensor_seed(starts.seed, tensor.name) % 2**31,
        )
        found = STARTS[starts.lora](group, starts.svd)
        yield tensor.name, found.stored.cpu()
        for depth, (a, b) in found.pairs.items():
            self.kept_energy[f"depths.{depth}.{linear}"] = round(found.kept[depth], 6)
            yield f"model.depths.{depth}.lora.{linear}.a", a.cpu()
            yield f"model.depths.{depth}.lora.{linear}.b", b.cpu()
