"""Which depths a fused operator runs, and which runtimes can generate with a graph in their own loop. Torch-free."""

from dataclasses import dataclass

from refold.blueprint.part_sizes import widest_arch
from refold.blueprint.passes import recurrent_depths
from refold.blueprint.schema import Blueprint


def caching_depths(blueprint: Blueprint) -> tuple[int, ...]:
    """Returns the depths that cache keys and values."""
    recurrent = recurrent_depths(blueprint)
    return tuple(i for i in range(blueprint.num_depths) if i not in recurrent and blueprint.made_heads(i))


def is_fused(blueprint: Blueprint, index: int) -> bool:
    """Says whether GroupQueryAttention can run the attention of a depth.

    All keys must be the depth's own, without a prefix, and the head size a multiple of 8.
    """
    depth = blueprint.depths[index]
    arch = blueprint.part_arch("mixer", depth.mixer)
    is_whole = not depth.prefix and not depth.kv and len(blueprint.made_heads(index)) == arch.num_key_value_heads
    return is_whole and arch.head_dim % 8 == 0


def shares_buffers(blueprint: Blueprint) -> bool:
    """Says whether past and present of every depth may be one buffer, which only GroupQueryAttention can fill."""
    return not recurrent_depths(blueprint) and all(is_fused(blueprint, index) for index in attending_depths(blueprint))


def attending_depths(blueprint: Blueprint) -> tuple[int, ...]:
    """Returns the depths with softmax attention."""
    recurrent = recurrent_depths(blueprint)
    return tuple(i for i, depth in enumerate(blueprint.depths) if depth.mixer is not None and i not in recurrent)


@dataclass(frozen=True)
class RuntimeLimits:
    """Reasons why runtimes cannot generate with a graph in loops of their own; empty: they can.

    Attributes:
        genai: For ONNX Runtime GenAI.
        web: For transformers.js.
    """

    genai: str
    web: str

    def sentences(self) -> tuple[str, ...]:
        """Returns a sentence for each runtime that cannot."""
        named = ("ONNX Runtime GenAI", self.genai), ("transformers.js", self.web)
        return tuple(
            f"{name} cannot generate with this graph ({reason}); ONNX Runtime can" for name, reason in named if reason
        )


def runtime_limits(blueprint: Blueprint) -> RuntimeLimits:
    """Returns the limits of the runtimes for one model."""
    made = {len(blueprint.made_heads(index)) for index in caching_depths(blueprint)}
    partial = "" if made <= {widest_arch(blueprint).num_key_value_heads} else "depths cache some of the key-value heads"
    depths = recurrent_depths(blueprint)
    recurrent = "depths keep a recurrent state" if depths else ""
    several = "depths keep recurrent states of several shapes" if len(_state_shapes(blueprint)) > 1 else ""
    nothing = "" if made or depths else "no depth caches keys and values"
    return RuntimeLimits(partial or several or nothing, partial or recurrent)


def _state_shapes(blueprint: Blueprint) -> set[tuple[int, int]]:
    """Returns the sizes of the states of depths with a recurrent mixer: of the state, and of kept inputs."""
    mixers = [
        blueprint.mixers[part].mixer
        for i in recurrent_depths(blueprint)
        if (part := blueprint.depths[i].mixer) is not None
    ]
    return {(each.state_elements(blueprint.arch), each.kept_elements(blueprint.arch)) for each in mixers}
