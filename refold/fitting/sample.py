"""Samples of inputs, updates and gradients of each part on text, taken during the backward pass and kept on disk."""

from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor

from refold.blueprint.schema import POOLS, Pool
from refold.checkpoint.tensor_file import write_tensors
from refold.data.packing import PackedSequence
from refold.fitting.kinds.kind import PartSample


class SamplePlan:
    """The sequences of a text that samples are taken from: some whole ones, drawn at random, and cut to one length.

    Args:
        packed: The text.
        num_tokens: Most tokens of a sample; at least one sequence is taken.
        seed: Seed of the choice.
    """

    def __init__(self, packed: PackedSequence, num_tokens: int, seed: int):
        rows, length = packed.input_ids.shape
        self.length = min(length, num_tokens)
        generator = torch.Generator().manual_seed(seed)
        count = max(1, num_tokens // self.length)
        self.rows = torch.randperm(rows, generator=generator)[:count].sort().values
        places = packed.position_ids[self.rows, : self.length]
        sequences = torch.arange(len(self.rows))[:, None].expand_as(places)
        self.positions: Int[Tensor, "S 2"] = torch.stack((sequences, places), dim=-1).flatten(0, 1)

    def take(self, states: Tensor) -> Tensor:
        """Returns the sample `[S, D]` of states `[B, T, D]` of the whole text."""
        return states[self.rows, : self.length].flatten(0, 1)


class SampleStore:
    """Samples of all parts, one file for each layer.

    Args:
        folder: An existing folder.
        plan: The sequences that are sampled.
    """

    def __init__(self, folder: Path, plan: SamplePlan):
        self._folder, self.plan = folder, plan

    def write(self, layer: int, seen: "PartsSeen") -> None:
        """Stores the samples of one layer."""
        tensors: dict[str, Tensor] = {}
        for pool in POOLS:
            joined = (torch.cat(pieces) for pieces in zip(*seen.pieces[pool], strict=True))
            for name, states in zip(("inputs", "updates", "gradients"), joined, strict=True):
                tensors[f"{pool}.{name}"] = states
            tensors[f"{pool}.leaving"] = torch.tensor(seen.leaving[pool] / seen.tokens[pool], dtype=torch.float64)
        write_tensors(self._path(layer), tensors, {})

    def read(self, layer: int, pool: Pool) -> PartSample:
        """Returns the sample of one part."""
        with safe_open(self._path(layer), framework="pt") as file:
            inputs, updates, gradients = (
                file.get_tensor(f"{pool}.{name}") for name in ("inputs", "updates", "gradients")
            )
        return PartSample(inputs, updates, gradients, self.plan.positions)

    def leaving(self, layer: int, pool: Pool) -> float:
        """Returns the mean of (g . u)^2 / 2 over all tokens of the text, with u the update of a part."""
        with safe_open(self._path(layer), framework="pt") as file:
            return float(file.get_tensor(f"{pool}.leaving"))

    def _path(self, layer: int) -> Path:
        return self._folder / f"sample-{layer:04d}.safetensors"


class PartsSeen:
    """Collects the sample of one layer during its backward pass, some sequences at a time."""

    def __init__(self, plan: SamplePlan):
        self._plan = plan
        self._first: dict[Pool, int] = dict.fromkeys(POOLS, 0)
        self.pieces: dict[Pool, list[tuple[Tensor, Tensor, Tensor]]] = {pool: [] for pool in POOLS}
        self.leaving: dict[Pool, float] = dict.fromkeys(POOLS, 0.0)
        self.tokens: dict[Pool, int] = dict.fromkeys(POOLS, 0)

    def see(self, layer: int, pool: Pool, stream: Tensor, update: Tensor, gradient: Tensor) -> None:
        """Adds the next sequences of one part; a `WatchPartBack`."""
        along = (gradient.double() * update.double()).sum(dim=-1).square()
        self.leaving[pool] += float(along.sum()) / 2
        self.tokens[pool] += along.numel()
        first = self._first[pool]
        self._first[pool] += len(stream)
        chosen = self._plan.rows[(self._plan.rows >= first) & (self._plan.rows < first + len(stream))] - first
        one, two, three = (
            states[chosen.to(states.device), : self._plan.length].flatten(0, 1).float().cpu()
            for states in (stream, update, gradient)
        )
        self.pieces[pool].append((one, two, three))
