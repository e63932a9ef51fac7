"""Rounding of a model's weights along its own residual stream, from the first depth to the last."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refold.blueprint.integers import Scheme, find_scheme
from refold.blueprint.kinds import TargetTensor
from refold.blueprint.schema import Blueprint, Pool, linear_pools
from refold.calibration.integer_factors import balance_factors, refit_second
from refold.calibration.moments import MomentSums
from refold.calibration.shrinkage import round_shrunk
from refold.checkpoint.reader import CheckpointReader
from refold.conversion.sequential import FittedTensors, TargetStack, depth_tensors
from refold.data.packing import PackedSequence
from refold.nn.rounding import Rounded, round_weight

EMBEDDING = "model.embed_tokens.weight"


class RoundingText(NamedTuple):
    """Calibration tokens that weights are rounded by.

    Attributes:
        sequences: The tokens.
        strength: Strength by which moments shrink; None: chosen for each weight by cross-checking the folds.
        folds: Fold of each sequence, from 0; required without a strength.
    """

    sequences: PackedSequence
    strength: float | None = 0.0
    folds: Int[Tensor, " B"] | None = None


class RoundingPass:
    """Rounds weights in the order in which the model first runs them.

    Two passes over the depths. The first runs the model with its weights as floats, and sums the second moments of the
    inputs that a stored linear has at all its depths but the first. The second rounds: at the first depth of a stored
    linear its moment is that of the inputs in the model rounded so far, plus the sum of the first pass. Factors B are
    fitted to the rounded A, and get its moment A H A^T. The first pass is left out where no part is used twice.

    Args:
        blueprint: The model, its weights as floats.
        schemes: Scheme of each weight to round, by the name of its tensor.
        reader: Reads the weights.
        scratch: Holds the moments of the first pass, and rounded weights that later depths run.
        device: Device that runs depths.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        schemes: Mapping[str, str],
        reader: CheckpointReader,
        scratch: FittedTensors,
        device: str = "cpu",
    ):
        self._blueprint, self._reader, self._scratch, self._device = blueprint, reader, scratch, device
        self._strength: float | None = 0.0
        self._schemes: dict[str, Scheme] = {name: find_scheme(scheme) for name, scheme in schemes.items()}

    def run(
        self, text: RoundingText, progress: Callable[[int], None] = lambda done: None
    ) -> Iterator[tuple[str, Rounded]]:
        """Yields the name and the integers of each weight of the stack, and of the embedding.

        Args:
            text: Calibration tokens.
            progress: Called with the number of depths that have run, those of both passes together.
        """
        table = self._reader.read(EMBEDDING)
        if EMBEDDING in self._schemes:
            rounded = round_weight(table, self._schemes[EMBEDDING], torch.ones(table.shape[1]))
            yield EMBEDDING, rounded
            table = rounded.dequantise()
        self._strength = text.strength
        begin = table[text.sequences.input_ids].float() * self._blueprint.arch.embedding_scale
        done = 0
        if self._is_tied():
            for _ in self._walk(text, begin, self._add_later):
                progress(done := done + 1)
        for found in self._walk(text, begin, self._round_depth):
            yield from found
            progress(done := done + 1)

    @property
    def num_steps(self) -> int:
        """Number of depths that both passes run."""
        return self._blueprint.num_depths * (2 if self._is_tied() else 1)

    def _is_tied(self) -> bool:
        return any(
            len(self._blueprint.users(pool, part)) > 1
            for pool in ("mixer", "mlp")
            for part in range(len(self._blueprint.pool(pool)))
        )

    def _walk(
        self,
        text: RoundingText,
        stream: Float[Tensor, "B T D"],
        visit: Callable[[int, MomentSums], list[tuple[str, Rounded]]],
    ) -> Iterator[list[tuple[str, Rounded]]]:
        """Runs all depths; each is visited with the moments of its inputs, and runs again if it changed."""
        stack = TargetStack(self._blueprint, text.sequences.position_ids, self._device)
        for index in range(self._blueprint.num_depths):
            tensors = depth_tensors(self._blueprint, index)
            for tensor in tensors:
                stack.put(tensor.name, self._value(tensor.name))
            sums = MomentSums(text.folds)
            after = stack.run(index, stream, sums.see_input)
            found, by_name = visit(index, sums), {tensor.name: tensor for tensor in tensors}
            for name, rounded in found:
                value = rounded.dequantise()
                stack.put(name, value)
                if self._runs_again(by_name[name]):
                    self._scratch.write(name, {name: value})
            stream = stack.run(index, stream) if found else after
            stack.take_out(tensor.name for tensor in tensors)
            yield found

    def _runs_again(self, tensor: TargetTensor) -> bool:
        return tensor.part is not None and len(self._blueprint.users(tensor.pool or "mixer", tensor.part)) > 1

    def _value(self, name: str) -> Tensor:
        return self._scratch[name] if name in self._scratch else self._reader.read(name)

    def _add_later(self, index: int, sums: MomentSums) -> list[tuple[str, Rounded]]:
        """Adds the moments of a depth's inputs to those of each stored linear that an earlier depth has run."""
        added: dict[str, Tensor] = {}
        for linear, pool in linear_pools(self._blueprint, index).items():
            part = getattr(self._blueprint.depths[index], pool)
            first = sums.shared.get(linear)
            if first is None or self._blueprint.users(pool, part)[0] == index:
                continue
            key = _key(pool, part, first)
            if key not in added:
                before = self._scratch.get(key, 0)
                added[key] = before + sums.inputs[first].cpu()
        for key, value in added.items():
            self._scratch.write(key, {key: value})
        return []

    def _round_depth(self, index: int, sums: MomentSums) -> list[tuple[str, Rounded]]:
        """Rounds the weights that this depth is the first to run."""
        found: dict[str, Rounded] = {}
        for tensor in depth_tensors(self._blueprint, index):
            scheme = self._schemes.get(tensor.name)
            if scheme is None or (tensor.part is not None and not self._is_first(tensor, index)):
                continue
            moment = self._input_moment(tensor, sums)
            weight = read_balanced(tensor.name, self._schemes, self._read)
            if moment is None:
                found[tensor.name] = round_weight(weight, scheme, torch.ones(weight.shape[1], device=weight.device))
                continue
            before = self._factor_before(tensor)
            if before is not None:
                value = found[before].dequantise() if before in found else self._value(before).float()
                value, first = value.to(moment.device), read_balanced(before, self._schemes, self._read)
                whole = moment if moment.ndim == 2 else moment.sum(dim=0)
                weight = refit_second(first, value, weight, whole, scheme.bits)
                moment = value @ moment @ value.T
            found[tensor.name] = round_shrunk(weight, moment, scheme, self._strength)
        return [(name, _to_cpu(rounded)) for name, rounded in found.items()]

    def _is_first(self, tensor: TargetTensor, index: int) -> bool:
        assert tensor.pool is not None
        assert tensor.part is not None
        return self._blueprint.users(tensor.pool, tensor.part)[0] == index

    def _read(self, name: str) -> Tensor:
        """Returns a weight before rounding."""
        return self._reader.read(name, torch.float32).to(self._device)

    def _input_moment(self, tensor: TargetTensor, sums: MomentSums) -> Float[Tensor, "*F in in"] | None:
        """Returns the second moments of the inputs of a weight's linear, by fold if the text has folds.

        None: the linear did not run.
        """
        assert tensor.pool is not None
        first = sums.shared.get(tensor.linear)
        if first is None:
            return None
        moment = sums.inputs[first]
        key = _key(tensor.pool, tensor.part_in(self._blueprint), first)
        if tensor.part is not None and key in self._scratch:
            moment = moment + self._scratch[key].to(moment.device)
        return moment

    def _factor_before(self, tensor: TargetTensor) -> str | None:
        """Returns the name of the factor A whose outputs a factor B reads; None for a weight that reads x itself."""
        for a, b in FACTOR_NAMES:
            if tensor.name.endswith(b):
                return f"{tensor.name.removesuffix(b)}{a}"
        if ".coefficients." in tensor.name:
            return f"model.{tensor.pool}s.{tensor.part_in(self._blueprint)}.{tensor.linear}.a.weight"
        return None


FACTOR_NAMES = ((".a.weight", ".b.weight"), (".a", ".b"))
"""Endings of the names of the two factors of a weight."""


def read_balanced(name: str, schemes: Collection[str], read: Callable[[str], Tensor]) -> Tensor:
    """Returns a weight as it is rounded: two factors of one weight that are both rounded are balanced first.

    Args:
        name: Of the weight, or of a factor.
        schemes: Names of the weights that are rounded.
        read: Reads a weight in float32.
    """
    for ends in FACTOR_NAMES:
        for place, end in enumerate(ends):
            if name.endswith(end):
                pair = [f"{name.removesuffix(end)}{each}" for each in ends]
                # A basis has no second factor of its own.
                return balance_factors(*map(read, pair))[place] if all(each in schemes for each in pair) else read(name)
    return read(name)


def _key(pool: Pool, part: int, linear: str) -> str:
    return f"{pool}s.{part}.{linear}"


def _to_cpu(weight: Rounded) -> Rounded:
    return Rounded(weight.integers.cpu(), weight.scale.cpu(), weight.zero_point.cpu(), weight.columns)
