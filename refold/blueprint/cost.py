"""Cost of a blueprint: parameters, bytes, cache and FLOPs, counted from its tensors and specs."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from refold.blueprint.kinds import Place
from refold.blueprint.owned.exits import count_exit_parameters, gate_flops, head_flops
from refold.blueprint.owned.kind import OwnedKind
from refold.blueprint.owned.registry import owned_kinds
from refold.blueprint.schema import Blueprint, depth_linears, linear_pools
from refold.blueprint.tensors import float_tensors, target_tensors
from refold.families.arch import Frozen
from refold.mixers.spec import MLP, CacheCost

STATE_BYTES = 4  # recurrent states are float32


class ContextFlops(Frozen):
    """FLOPs that grow with the context: `flops` for each visible token, at most `max_tokens` of them (None: all)."""

    flops: int
    max_tokens: int | None


class ExitCost(Frozen):
    """Cost of one early exit."""

    depths: int
    """Number of depths that run."""
    parameters: int
    """Parameters that only this exit uses."""
    flops_per_token: int
    """FLOPs of one token: these depths, the gates before the exit, and the head with the exit's LoRA."""


class Cost(Frozen):
    """Cost of storing and running a model. A multiply-add counts as two FLOPs."""

    parameters: int
    """All stored parameters, those of exits included."""
    non_embedding_parameters: int
    """All parameters except embedding and head: the number by which papers state sizes."""
    weight_bytes: int
    cache: tuple[CacheCost, ...]
    """KV cache of one sequence: one entry for each window size, widest first."""
    state_bytes: int
    """Recurrent state of one sequence, the last inputs of convolutions and windows, and the keys and values of
    prefixes. All sequences of a cache share the prefixes."""
    flops_per_token: int
    """FLOPs of one token through every depth and the head: all linears with their LoRAs. Not counted: embedding
    look-up, norms, activations, rotary embedding, biases, keys and values of prefixes (computed once), and exits (a
    token that runs every depth does not use them)."""
    flops_per_context_token: int
    """FLOPs of one token for each visible token, as long as the context fits into every window."""
    context_flops: tuple[ContextFlops, ...]
    """The same FLOPs by window: one entry for each window size, widest first."""
    exits: tuple[ExitCost, ...] = ()
    """Costs of the exits, in the order of the depths."""

    def cache_bytes(self, context: int) -> int:
        """Returns the bytes cached for one sequence of `context` tokens, recurrent state included."""
        return self.state_bytes + sum(each.bytes_per_token * _reached(context, each.max_tokens) for each in self.cache)

    def memory_bytes(self, context: int) -> int:
        """Returns the bytes of weights, cache and state together."""
        return self.weight_bytes + self.cache_bytes(context)

    def flops(self, context: int) -> int:
        """Returns the FLOPs of the token that follows `context` tokens."""
        return self.flops_per_token + sum(
            each.flops * _reached(context, each.max_tokens) for each in self.context_flops
        )


class ParameterCount(NamedTuple):
    """Numbers of parameters by place in the model."""

    embedding: int
    head: int
    final_norm: int
    layer: int
    """Mean over all depths; for a source, the parameters of one layer."""
    exits: int
    """Parameters that only exits use."""

    non_embedding: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.non_embedding


def smaller_from(source: Cost, target: Cost) -> int | None:
    """Returns the context length from which on a target needs less memory than its source.

    Memory is weights, cache and state of one sequence. The difference in memory is linear between two window sizes, so
    the length is exact. 0: the target is smaller at every length; None: the target never becomes and stays smaller.
    """

    def excess(context: int) -> int:
        return target.memory_bytes(context) - source.memory_bytes(context)

    windows = {each.max_tokens for each in (*source.cache, *target.cache) if each.max_tokens is not None}
    first, *earlier = sorted({0, *windows}, reverse=True)
    growth = excess(first + 1) - excess(first)
    if growth > 0 or (growth == 0 and excess(first) >= 0):
        return None
    # Each linear piece ends below zero. If it begins at or above zero, it falls by the same amount for each token.
    for begin in (first, *earlier):
        if excess(begin) >= 0:
            return begin + excess(begin) // (excess(begin) - excess(begin + 1)) + 1
    return 0


def _reached(context: int, window: int | None) -> int:
    return context if window is None else min(context, window)


def count_parameters(blueprint: Blueprint) -> ParameterCount:
    """Counts the parameters of a blueprint; a tied parameter counts once."""
    counted: Counter[Place] = Counter()
    for tensor in float_tensors(blueprint):
        counted[tensor.kind.place] += tensor.num_elements
    return ParameterCount(
        embedding=counted["embedding"],
        head=counted["head"],
        final_norm=counted["final_norm"],
        layer=counted["stack"] // blueprint.num_depths,
        exits=counted["exits"],
        non_embedding=counted["stack"] + counted["exits"] + counted["final_norm"],
    )


def count_weight_bytes(blueprint: Blueprint, dtype_bytes: int) -> int:
    """Returns the bytes of all stored tensors; those of quantised weights have their own dtypes.

    Args:
        blueprint: The blueprint.
        dtype_bytes: Bytes of one number in tensors of floats.
    """
    return sum(
        tensor.num_elements * dtype_bytes if tensor.piece is None else tensor.piece.num_bytes
        for tensor in target_tensors(blueprint)
    )


def cost(blueprint: Blueprint, dtype_bytes: int) -> Cost:
    """Computes the cost of a blueprint.

    Args:
        blueprint: The blueprint.
        dtype_bytes: Bytes of one weight and of one cached number.
    """
    counted, kinds = count_parameters(blueprint), owned_kinds(blueprint)
    cached: Counter[int | None] = Counter()
    looked_back: Counter[int | None] = Counter()
    state = 0
    for index, depth in enumerate(blueprint.depths):
        if depth.mixer is None:
            continue
        made = len(blueprint.made_heads(index))
        mixer, arch = blueprint.mixers[depth.mixer].mixer, blueprint.part_arch("mixer", depth.mixer)
        cached[depth.window] += dtype_bytes * mixer.cache_elements_per_token(arch) * made // arch.num_key_value_heads
        looked_back[depth.window] += mixer.flops_per_context_token(arch)
        state += STATE_BYTES * mixer.state_elements(arch) + dtype_bytes * mixer.kept_elements(arch)
        state += dtype_bytes * sum(kind.kept_elements(blueprint, index) for kind in kinds)
    return Cost(
        parameters=counted.total,
        non_embedding_parameters=counted.non_embedding,
        weight_bytes=count_weight_bytes(blueprint, dtype_bytes),
        cache=tuple(CacheCost(size, window) for window, size in _widest_first(cached)),
        state_bytes=state,
        flops_per_token=_head_flops(blueprint)
        + sum(_depth_flops(blueprint, index, kinds) for index in range(blueprint.num_depths)),
        flops_per_context_token=looked_back.total(),
        context_flops=tuple(
            ContextFlops(flops=count, max_tokens=window) for window, count in _widest_first(looked_back)
        ),
        exits=tuple(_exit_costs(blueprint, kinds)),
    )


def _exit_costs(blueprint: Blueprint, kinds: Sequence[OwnedKind]) -> Iterator[ExitCost]:
    flops, arch = _head_flops(blueprint), blueprint.arch
    for index, depth in enumerate(blueprint.depths):
        flops += _depth_flops(blueprint, index, kinds)
        if depth.exit is not None:
            flops += gate_flops(arch, depth.exit)
            yield ExitCost(
                depths=index + 1,
                parameters=count_exit_parameters(arch, depth.exit),
                flops_per_token=flops + head_flops(arch, depth.exit),
            )


def _head_flops(blueprint: Blueprint) -> int:
    return 2 * blueprint.arch.vocab_size * blueprint.arch.hidden_size


def _depth_flops(blueprint: Blueprint, index: int, kinds: Sequence[OwnedKind]) -> int:
    depth, flops = blueprint.depths[index], _linear_flops(blueprint, index)
    flops += sum(kind.flops(blueprint, index) for kind in kinds)
    if depth.mixer is not None:
        flops += blueprint.mixers[depth.mixer].mixer.flops_per_token(blueprint.part_arch("mixer", depth.mixer))
    if depth.mlp is not None:
        flops += MLP.flops_per_token(blueprint.part_arch("mlp", depth.mlp))
    return flops


def _linear_flops(blueprint: Blueprint, index: int) -> int:
    """Counts the FLOPs of the stored linears, factors and bases for one token at a depth."""
    linears, total = depth_linears(blueprint, index), 0
    for name, pool in linear_pools(blueprint, index).items():
        (rows, columns), stored = linears[name], blueprint.pool(pool)[getattr(blueprint.depths[index], pool)]
        if name in stored.bases:
            total += stored.bases[name] * columns
        elif name in stored.factors:
            total += stored.factors[name] * (rows + columns)
        else:
            total += rows * columns
    return 2 * total


def _widest_first(amounts: Counter[int | None]) -> list[tuple[int | None, int]]:
    found = [(window, amount) for window, amount in amounts.items() if amount]
    return sorted(found, key=lambda each: float("inf") if each[0] is None else each[0], reverse=True)
