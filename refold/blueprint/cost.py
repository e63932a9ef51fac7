"""What a blueprint costs: parameters, bytes, cache, FLOPs; counted from its tensors and specs, never from a formula."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from refold.blueprint.contents import depth_linears, linear_pools
from refold.blueprint.owned.exits import count_exit_parameters, gate_flops, head_flops
from refold.blueprint.owned.registry import OWNED
from refold.blueprint.schema import Blueprint
from refold.blueprint.tensor_kind import Place
from refold.blueprint.tensors import target_tensors
from refold.families.arch import Frozen
from refold.mixers.mlp import MLP
from refold.mixers.spec import CacheCost

STATE_BYTES = 4  # recurrent states are float32


class ContextFlops(Frozen):
    """FLOPs that grow with the context: `flops` for each token looked back to, at most `max_tokens` (None: all)."""

    flops: int
    max_tokens: int | None


class ExitCost(Frozen):
    """What it costs to leave the stack early."""

    depths: int
    """How many depths run."""
    parameters: int
    """Stored for this exit alone."""
    flops_per_token: int
    """One token through these depths, the gates it passes, and the head with the exit's LoRA."""


class Cost(Frozen):
    """What a model costs to store and to run. FLOPs count a multiply-add as two."""

    parameters: int
    """All that are stored, exits' own included."""
    non_embedding_parameters: int
    """Without embedding and head, the way sizes are quoted."""
    weight_bytes: int
    cache: tuple[CacheCost, ...]
    """For one sequence; one entry for each window, widest first."""
    state_bytes: int
    """Recurrent state of one sequence, with the last inputs of convolutions and windows; and the keys and values of
    prefixes, which all sequences of a cache share."""
    flops_per_token: int
    """One token through every depth and the head: all linears with their LoRAs. Not counted: embedding look-up, norms,
    activations, rotary embedding, biases, keys and values of prefixes, which are made once, and exits, which a token
    that runs every depth does not use."""
    flops_per_context_token: int
    """One token, for each token it looks back to while all windows still reach it."""
    context_flops: tuple[ContextFlops, ...]
    """The same, one entry for each window, widest first."""
    exits: tuple[ExitCost, ...] = ()
    """Top to bottom."""

    def cache_bytes(self, context: int) -> int:
        """Bytes cached for one sequence of `context` tokens, recurrent state included."""
        return self.state_bytes + sum(each.bytes_per_token * _reached(context, each.max_tokens) for each in self.cache)

    def memory_bytes(self, context: int) -> int:
        """Bytes of weights, cache and state together."""
        return self.weight_bytes + self.cache_bytes(context)

    def flops(self, context: int) -> int:
        """FLOPs for the token after `context` tokens."""
        return self.flops_per_token + sum(
            each.flops * _reached(context, each.max_tokens) for each in self.context_flops
        )


class ParameterCount(NamedTuple):
    """Parameters by where they stand."""

    embedding: int
    head: int
    final_norm: int
    layer: int
    """The mean of all depths; of a source, one layer."""
    exits: int
    """What exits have of their own."""

    non_embedding: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.non_embedding


def smaller_from(source: Cost, target: Cost) -> int | None:
    """Returns the context length from which on a target needs less memory than its source.

    Weights, cache and state of one sequence are counted. Their difference is linear between windows' ends, so this is
    the exact length: 0 where the target is smaller at every length, None where it is not from any length on.
    """

    def excess(context: int) -> int:
        return target.memory_bytes(context) - source.memory_bytes(context)

    windows = {each.max_tokens for each in (*source.cache, *target.cache) if each.max_tokens is not None}
    first, *earlier = sorted({0, *windows}, reverse=True)
    growth = excess(first + 1) - excess(first)
    if growth > 0 or (growth == 0 and excess(first) >= 0):
        return None
    # Each piece ends below zero, so where it begins above it falls by the same amount at each token.
    for begin in (first, *earlier):
        if excess(begin) >= 0:
            return begin + excess(begin) // (excess(begin) - excess(begin + 1)) + 1
    return 0


def _reached(context: int, window: int | None) -> int:
    return context if window is None else min(context, window)


def count_parameters(blueprint: Blueprint) -> ParameterCount:
    """Counts the parameters of a blueprint, each stored one once."""
    counted: Counter[Place] = Counter()
    for tensor in target_tensors(blueprint):
        counted[tensor.kind.place] += tensor.num_elements
    return ParameterCount(
        embedding=counted["embedding"],
        head=counted["head"],
        final_norm=counted["final_norm"],
        layer=counted["stack"] // blueprint.num_depths,
        exits=counted["exits"],
        non_embedding=counted["stack"] + counted["exits"] + counted["final_norm"],
    )


def cost(blueprint: Blueprint, dtype_bytes: int) -> Cost:
    """Prices a blueprint.

    Args:
        blueprint: What to price.
        dtype_bytes: Bytes of one weight and of one cached number.
    """
    counted, arch = count_parameters(blueprint), blueprint.arch
    cached: Counter[int | None] = Counter()
    looked_back: Counter[int | None] = Counter()
    state = 0
    for index, depth in enumerate(blueprint.depths):
        if depth.mixer is None:
            continue
        made = len(blueprint.made_heads(index))
        mixer = blueprint.mixers[depth.mixer].mixer
        cached[depth.window] += dtype_bytes * mixer.cache_elements_per_token(arch) * made // arch.num_key_value_heads
        looked_back[depth.window] += mixer.flops_per_context_token(arch)
        state += STATE_BYTES * mixer.state_elements(arch) + dtype_bytes * mixer.kept_elements(arch)
        state += dtype_bytes * sum(kind.kept_elements(blueprint, index) for kind in OWNED)
    return Cost(
        parameters=counted.total,
        non_embedding_parameters=counted.non_embedding,
        weight_bytes=counted.total * dtype_bytes,
        cache=tuple(CacheCost(size, window) for window, size in _widest_first(cached)),
        state_bytes=state,
        flops_per_token=_head_flops(blueprint)
        + sum(_depth_flops(blueprint, index) for index in range(blueprint.num_depths)),
        flops_per_context_token=looked_back.total(),
        context_flops=tuple(
            ContextFlops(flops=count, max_tokens=window) for window, count in _widest_first(looked_back)
        ),
        exits=tuple(_exit_costs(blueprint)),
    )


def _exit_costs(blueprint: Blueprint) -> Iterator[ExitCost]:
    flops, arch = _head_flops(blueprint), blueprint.arch
    for index, depth in enumerate(blueprint.depths):
        flops += _depth_flops(blueprint, index)
        if depth.exit is not None:
            flops += gate_flops(arch, depth.exit)
            yield ExitCost(
                depths=index + 1,
                parameters=count_exit_parameters(arch, depth.exit),
                flops_per_token=flops + head_flops(arch, depth.exit),
            )


def _head_flops(blueprint: Blueprint) -> int:
    return 2 * blueprint.arch.vocab_size * blueprint.arch.hidden_size


def _depth_flops(blueprint: Blueprint, index: int) -> int:
    depth, flops = blueprint.depths[index], _linear_flops(blueprint, index)
    flops += sum(kind.flops(blueprint, index) for kind in OWNED)
    if depth.mixer is not None:
        flops += blueprint.mixers[depth.mixer].mixer.flops_per_token(blueprint.arch)
    if depth.mlp is not None:
        flops += MLP.flops_per_token(blueprint.arch)
    return flops


def _linear_flops(blueprint: Blueprint, index: int) -> int:
    """FLOPs of the stored linears, factors and bases that one token passes at a depth."""
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
