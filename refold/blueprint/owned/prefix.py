"""Prefixes: learned vectors of a depth. Every token attends to their keys and values."""

from collections.abc import Iterator

from refold.blueprint.kinds import TargetTensor, matrix_fill
from refold.blueprint.origins import Initialisation, Origin
from refold.blueprint.owned.kind import OwnedKind
from refold.blueprint.schema import Blueprint
from refold.mixers.spec import Fill


class DepthPrefix(OwnedKind):
    """The prefix `[length, hidden_size]` of a depth (RRT, appendix H). Like an embedding, it has no weight decay."""

    url = "https://arxiv.org/abs/2410.20672"
    field = "prefix"
    groups = frozenset({"adapters"})

    def tensors(self, blueprint: Blueprint, index: int) -> Iterator[TargetTensor]:
        length = blueprint.depths[index].prefix
        if length:
            name, shape = f"model.depths.{index}.prefix", (length, blueprint.arch.hidden_size)
            yield TargetTensor(name, shape, self, "mixer", depth=index, local="prefix")

    def describe(self, blueprint: Blueprint, index: int) -> str:
        length = blueprint.depths[index].prefix
        return f"prefix {length}" if length else ""

    def notes(self, blueprint: Blueprint) -> tuple[str, ...]:
        lengths = [depth.prefix for depth in blueprint.depths if depth.prefix]
        if not lengths:
            return ()
        parameters = sum(lengths) * blueprint.arch.hidden_size
        return (
            f"relax: {len(lengths)} depths have prefixes of {lengths[0]} vectors ({parameters:,} parameters); "
            f"before training they are noise that takes attention from the tokens",
        )

    def origin(self, blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> Origin:
        return Origin("fresh", tensor.local)

    def fill(self, blueprint: Blueprint, tensor: TargetTensor) -> Fill:
        return matrix_fill(blueprint)

    def explain(self, made: Origin, blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> str:
        return "Gaussian: every initialisation changes the outputs"

    def flops(self, blueprint: Blueprint, index: int) -> int:
        depth = blueprint.depths[index]
        if depth.mixer is None:
            return 0
        arch = blueprint.part_arch("mixer", depth.mixer)
        return depth.prefix * blueprint.mixers[depth.mixer].mixer.flops_per_context_token(arch)

    def kept_elements(self, blueprint: Blueprint, index: int) -> int:
        depth = blueprint.depths[index]
        if depth.mixer is None:
            return 0
        arch = blueprint.part_arch("mixer", depth.mixer)
        return depth.prefix * blueprint.mixers[depth.mixer].mixer.cache_elements_per_token(arch)

    def obstacle(self, blueprint: Blueprint) -> tuple[str, str] | None:
        index = next((index for index, depth in enumerate(blueprint.depths) if depth.prefix), None)
        return None if index is None else ("attention to tokens alone", f"depth {index} has a prefix")


PREFIX = DepthPrefix()
