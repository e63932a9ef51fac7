"""The stack of a target, run depth by depth while it is being made: a few depths' weights are in memory at a time."""

from collections.abc import Iterable
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from refold.blueprint.schema import Blueprint
from refold.measuring.layers import reach_input
from refold.modeling.configuration import RefoldConfig
from refold.modeling.depth import Lent
from refold.modeling.model import RefoldModel
from refold.nn.rotary import Rotary


class TargetStack:
    """A target in float32 whose tensors are put in where they are needed, and taken out behind the last depth that
    runs them.

    Args:
        blueprint: The target.
        positions: Of every token within its document.
        device: Where depths compute; results come back to the CPU.
        rows_at_once: How many sequences a depth computes at once.

    Attributes:
        rows: Which sequences are computed together.
    """

    def __init__(self, blueprint: Blueprint, positions: Int[Tensor, "B T"], device: str = "cpu", rows_at_once: int = 4):
        self._blueprint, self._positions, self._device = blueprint, positions, device
        self.rows = [slice(first, first + rows_at_once) for first in range(0, len(positions), rows_at_once)]
        # Keys and values that later depths read, for each run of rows.
        self._lent: list[Lent] = [{} for _ in self.rows]
        # Neither embedding nor head is asked for anything.
        small = blueprint.arch.model_copy(update={"vocab_size": 1})
        config = RefoldConfig(blueprint=blueprint.model_copy(update={"arch": small}).model_dump(mode="json"))
        with torch.device("meta"):
            self._model = RefoldModel(config).eval()
        for rotary in self._model.rotaries:
            cast("Rotary", rotary.to_empty(device=device)).reset()

    def put(self, name: str, value: Tensor) -> None:
        """Puts a tensor in, by its name in the target."""
        owner, kind = self._place(name)
        setattr(owner, kind, nn.Parameter(value.float().to(self._device), requires_grad=False))

    def take_out(self, names: Iterable[str]) -> None:
        """Lets tensors go."""
        for name in names:
            owner, kind = self._place(name)
            setattr(owner, kind, nn.Parameter(getattr(owner, kind).to("meta"), requires_grad=False))

    @torch.no_grad()
    def input_of(
        self, depth: int, linear: str, rows: slice, hidden_states: Float[Tensor, "B T D"]
    ) -> Float[Tensor, "B T in"]:
        """Returns what a linear sees at a depth, where the depth computes; what runs later need not be there.

        Args:
            depth: Which depth.
            linear: `q_proj`, `down_proj`, ...
            rows: One of `rows`.
            hidden_states: The stream of those before the depth.
        """
        spec = self._blueprint.depths[depth]
        parts = [] if spec.mixer is None else [self._model.mixers[spec.mixer]]
        parts += [] if spec.mlp is None else [self._model.mlps[spec.mlp]]
        found = next(part.get_submodule(linear) for part in parts if hasattr(part, linear))
        return reach_input(found, lambda: self._run(depth, rows, hidden_states))

    @torch.no_grad()
    def run(self, depth: int, hidden_states: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Returns the stream after a depth."""
        return torch.cat([self._run(depth, rows, hidden_states[rows]).cpu() for rows in self.rows])

    def _run(self, depth: int, rows: slice, hidden_states: Tensor) -> Tensor:
        states = hidden_states.to(self._device)
        contexts = self._model.contexts(states, position_ids=self._positions[rows].to(self._device))
        return self._model.run_depth(depth, states, contexts, lent=self._lent[self.rows.index(rows)])

    def _place(self, name: str) -> tuple[nn.Module, str]:
        owner, _, kind = name.removeprefix("model.").rpartition(".")
        return self._model.get_submodule(owner), kind
