"""Rows of one batch with different depths or adapters, run together through the parts they share."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from refold.errors import RefoldError
from refold.modeling.depth import Depth, Parts
from refold.modeling.owned_tensors import Owned, join_owned
from refold.nn.mixers.attention import AttentionMixer
from refold.nn.mixers.batch import Batch
from refold.nn.mixers.store import NOTHING_KEPT, Store, StorePart


class RowRange(NamedTuple):
    """A run of neighbouring rows.

    Attributes:
        depths: The depths they run.
        num_rows: How many rows.
        modules: The stack's depths with other adapters; None: with its own.
    """

    depths: range
    num_rows: int
    modules: Sequence[Depth] | None = None


def run_rows(
    modules: Sequence[Depth],
    parts_of: Callable[[Depth], Parts],
    rows: Sequence[RowRange],
    hidden_states: Float[Tensor, "B T D"],
    batch: Batch,
    store: Store | None,
) -> Float[Tensor, "B T D"]:
    """Runs each row through its range of depths; arguments as for `RefoldModel.run_rows`.

    Args:
        modules: The stack's depths.
        parts_of: Returns the parts a depth runs.
        rows: Runs of rows.
        hidden_states: The residual stream.
        batch: Of the pass.
        store: Memory for each row; None: nothing is kept.

    Raises:
        RefoldError: The depths cannot run together.
    """
    num_rows = sum(each.num_rows for each in rows)
    if not rows or num_rows != len(hidden_states) or len({len(each.depths) for each in rows}) != 1:
        told = ", ".join(f"{each.num_rows} rows at {each.depths.start}..{each.depths.stop - 1}" for each in rows)
        raise RefoldError(
            f"rows: ranges of one length for all {len(hidden_states)} rows are required (got {told}); split the call"
        )
    slices = _slices(rows)
    stacks = [modules if each.modules is None else each.modules for each in rows]
    for indices in zip(*(each.depths for each in rows), strict=True):
        depths = [stack[index] for stack, index in zip(stacks, indices, strict=True)]
        memory = NOTHING_KEPT if store is None else store.row_memory(_store_parts(depths, slices))
        _require_alike(depths, memory.attends)
        first, each_owned = depths[0], [depth.owned() for depth in depths]
        parts, inputs = parts_of(first), first.inputs(batch, memory)
        if store is not None and first.prefix is not None and len(depths) > 1:
            _make_prefixes(parts, depths, each_owned, store)
            inputs = inputs._replace(prefix=None)
        hidden_states, _ = first.compute(hidden_states, parts, inputs, join_owned(slices, each_owned))
    return hidden_states


def rows_owned(rows: Sequence[RowRange], depth: Depth) -> Owned:
    """Returns the tensors with which each run of rows runs one depth."""
    depths = [depth if each.modules is None else each.modules[depth.index] for each in rows]
    return join_owned(_slices(rows), [each.owned() for each in depths])


def _slices(rows: Sequence[RowRange]) -> list[slice]:
    """Returns the rows of the batch that each run has."""
    ends = itertools.accumulate(each.num_rows for each in rows)
    return [slice(end - each.num_rows, end) for end, each in zip(ends, rows, strict=True)]


def _store_parts(depths: Sequence[Depth], slices: Sequence[slice]) -> list[StorePart]:
    """Returns the rows at each depth. Rows that differ in their adapters alone are one part, unless these differ in
    prefixes: the memory then computes attention for all of them together."""
    found: list[StorePart] = []
    for depth, rows in zip(depths, slices, strict=True):
        adapters = 0 if depth.prefix is None else depth.adapters_number
        last = found[-1] if found else None
        if last is not None and (last.depth, last.adapters) == (depth.index, adapters):
            found[-1] = StorePart(depth.index, slice(last.rows.start, rows.stop), adapters)
        else:
            found.append(StorePart(depth.index, rows, adapters))
    return found


def _make_prefixes(parts: Parts, depths: Sequence[Depth], owned: Sequence[Owned], store: Store) -> None:
    """Lets each depth make the keys and values of its own prefix, for a memory that attends to them by itself."""
    mixer = parts.mixer
    assert isinstance(mixer, AttentionMixer)
    for depth, own in zip(depths, owned, strict=True):
        assert depth.prefix is not None
        make = partial(mixer.read_prefix, depth.prefix, own.adapters, own.mixer_vectors)
        store.memory(depth.index, depth.adapters_number).once(make)


def _require_alike(depths: Sequence[Depth], attends: bool) -> None:
    """Refuses depths that differ in something other than adapters, norms, biases, prefixes and sources of keys.

    Args:
        depths: One for each group of rows.
        attends: Whether the memory computes attention, for each group by its own prefix and sources.
    """
    depths = list({depth.index: depth for depth in reversed(depths)}.values())[::-1]  # adapters may always differ
    first = depths[0]
    for depth in depths[1:]:
        for name in ("mixer", "mlp", "window", "rope", "vectors", "gain"):
            ours, theirs = getattr(first.spec, name), getattr(depth.spec, name)
            if ours != theirs:
                raise RefoldError(
                    f"rows: depths that run the same parts alike are required (depth {first.index} has {name} {ours}, "
                    f"depth {depth.index} {theirs}); run their rows by themselves"
                )
        ours, theirs = (None if each.prefix is None else len(each.prefix) for each in (first, depth))
        if (ours is None) != (theirs is None) or _made(first) != _made(depth):
            raise RefoldError(
                f"rows: depths that all have prefixes or none, and make the same key-value heads, are required (depth "
                f"{first.index} has {ours or 0} prefix vectors and makes {_made(first)}, depth {depth.index} "
                f"{theirs or 0} and {_made(depth)}); run their rows by themselves"
            )
    for depth in depths if len(depths) > 1 else ():
        if not attends and (depth.heads is not None or depth.prefix is not None):
            raise RefoldError(
                f"rows: depths without shared keys and without prefixes are required (depth {depth.index} has some); "
                f"run its rows by themselves"
            )
        others = [name for name in depth.own_names() if not name.endswith(("_norm.weight", "_norm.bias", "_proj.bias"))]
        if others:
            raise RefoldError(
                f"rows: depths whose own vectors are norms and biases are required (depth {depth.index} has "
                f"{others[0]}); run its rows by themselves"
            )


def _made(depth: Depth) -> tuple[int, ...] | str:
    """Returns the key-value heads that a depth makes."""
    return "all" if depth.heads is None or depth.heads.makes_all else depth.heads.made
