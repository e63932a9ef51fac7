"""The list of all tensors of a folded model, which the cost counts, the converter writes and the model loads."""

from collections.abc import Iterator, Sequence

from refold.blueprint.kinds import EMBEDDING, FACTOR, FINAL_NORM, HEAD, LINEAR, VECTOR, TargetTensor
from refold.blueprint.owned.kind import OwnedKind
from refold.blueprint.owned.registry import owned_kinds
from refold.blueprint.schema import POOLS, Blueprint, Pool, depth_linears, part_linears, part_vectors
from refold.mixers.spec import norm_vectors


def target_tensors(blueprint: Blueprint) -> Iterator[TargetTensor]:
    """Yields every tensor of the target in storage order; a quantised weight as the tensors that hold its integers."""
    for tensor in float_tensors(blueprint):
        scheme = tensor.scheme(blueprint)
        yield from (tensor,) if scheme is None else tensor.stored_as(scheme)


def float_tensors(blueprint: Blueprint) -> Iterator[TargetTensor]:
    """Yields every tensor of the target, quantised weights as one tensor each, in storage order.

    The order is embedding, parts, depths, exits, final norm, head.
    """
    arch, kinds = blueprint.arch, owned_kinds(blueprint)
    inside = [kind for kind in kinds if kind.place == "stack"]
    outside = [kind for kind in kinds if kind.place == "exits"]
    yield TargetTensor("model.embed_tokens.weight", (arch.vocab_size, arch.hidden_size), EMBEDDING)
    for pool in POOLS:
        for index in range(len(blueprint.pool(pool))):
            yield from _part_tensors(blueprint, pool, index)
    for index in range(blueprint.num_depths):
        yield from _depth_tensors(blueprint, index, inside)
    for index in range(blueprint.num_depths):
        yield from (tensor for kind in outside for tensor in kind.tensors(blueprint, index))
    for local, shape in norm_vectors("norm", arch.norm, arch.hidden_size).items():
        yield TargetTensor(f"model.{local}", shape, FINAL_NORM, local=local)
    if not arch.tied_head:
        yield TargetTensor("lm_head.weight", (arch.vocab_size, arch.hidden_size), HEAD, local="lm_head.weight")


def _part_tensors(blueprint: Blueprint, pool: Pool, index: int) -> Iterator[TargetTensor]:
    prefix, stored = f"model.{pool}s.{index}", blueprint.pool(pool)[index]
    if blueprint.keeps_vectors(pool, index):
        for local, shape in part_vectors(blueprint, pool, index).items():
            yield TargetTensor(f"{prefix}.{local}", shape, VECTOR, pool, part=index, local=local)
    for linear, shape in part_linears(blueprint, pool, index).items():
        if linear in stored.bases:
            local, basis = f"{linear}.a.weight", (stored.bases[linear], shape[1])
            yield TargetTensor(f"{prefix}.{local}", basis, FACTOR, pool, part=index, local=local)
        else:
            yield from _stored_linear(prefix, linear, shape, pool, index, stored.factors.get(linear))


def _stored_linear(
    prefix: str, linear: str, shape: tuple[int, int], pool: Pool, part: int, rank: int | None
) -> Iterator[TargetTensor]:
    """Yields the tensors of one linear in a part: a matrix (rank None), two factors, or nothing (rank 0)."""
    rows, columns = shape
    if rank is None:
        local = f"{linear}.weight"
        yield TargetTensor(f"{prefix}.{local}", shape, LINEAR, pool, part=part, local=local)
    elif rank > 0:
        for name, each in (("a", (rank, columns)), ("b", (rows, rank))):
            local = f"{linear}.{name}.weight"
            yield TargetTensor(f"{prefix}.{local}", each, FACTOR, pool, part=part, local=local)


def _depth_tensors(blueprint: Blueprint, index: int, kinds: Sequence[OwnedKind]) -> Iterator[TargetTensor]:
    """Yields the tensors of a depth inside the stack, sorted by linear in the order of execution."""
    order = {linear: place for place, linear in enumerate(depth_linears(blueprint, index))}
    tensors = (tensor for kind in kinds for tensor in kind.tensors(blueprint, index))
    yield from sorted(tensors, key=lambda tensor: order.get(tensor.local, -1))
