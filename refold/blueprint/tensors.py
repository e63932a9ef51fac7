"""Every tensor of a folded model, by name: what the cost counts, the converter writes and the model loads."""

from collections.abc import Iterator

from refold.blueprint.contents import depth_linears, part_linears, part_vectors
from refold.blueprint.owned.registry import OWNED
from refold.blueprint.schema import POOLS, Blueprint, Pool
from refold.blueprint.stored import EMBEDDING, FACTOR, FINAL_NORM, HEAD, LINEAR, VECTOR
from refold.blueprint.tensor_kind import Place, TargetTensor
from refold.mixers.spec import norm_vectors


def target_tensors(blueprint: Blueprint) -> Iterator[TargetTensor]:
    """Yields every tensor of the target once, in the order it is stored.

    That is: embedding, parts, depths, exits, final norm, head.
    """
    arch = blueprint.arch
    yield TargetTensor("model.embed_tokens.weight", (arch.vocab_size, arch.hidden_size), EMBEDDING)
    for pool in POOLS:
        for index in range(len(blueprint.pool(pool))):
            yield from _part_tensors(blueprint, pool, index)
    for index in range(blueprint.num_depths):
        yield from _depth_tensors(blueprint, index)
    for index in range(blueprint.num_depths):
        yield from _owned(blueprint, index, "exits")
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
    """A matrix, or two factors of a rank, or with rank 0 nothing."""
    rows, columns = shape
    if rank is None:
        local = f"{linear}.weight"
        yield TargetTensor(f"{prefix}.{local}", shape, LINEAR, pool, part=part, local=local)
    elif rank > 0:
        for name, each in (("a", (rank, columns)), ("b", (rows, rank))):
            local = f"{linear}.{name}.weight"
            yield TargetTensor(f"{prefix}.{local}", each, FACTOR, pool, part=part, local=local)


def _depth_tensors(blueprint: Blueprint, index: int) -> Iterator[TargetTensor]:
    """Everything that a depth owns in the stack; tensors of one linear stand together, in the order linears run."""
    order = {linear: place for place, linear in enumerate(depth_linears(blueprint, index))}
    yield from sorted(_owned(blueprint, index, "stack"), key=lambda tensor: order.get(tensor.local, -1))


def _owned(blueprint: Blueprint, index: int, place: Place) -> Iterator[TargetTensor]:
    return (tensor for kind in OWNED if kind.place == place for tensor in kind.tensors(blueprint, index))
