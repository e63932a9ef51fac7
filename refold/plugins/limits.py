"""The stacks that plugins for engines hold, and the reasons against all others; torch-free."""

from refold.blueprint.part_sizes import head_counts, neuron_counts, widest_arch
from refold.blueprint.schema import Blueprint
from refold.errors import RefoldError


def require_servable(blueprint: Blueprint, engine: str = "vllm") -> None:
    """Checks that an engine's attention layers can serve a stack.

    Args:
        blueprint: The stack.
        engine: The engine's name: `vllm` or `sglang`.

    Raises:
        RefoldError: A depth has a mixer with a state or a prefix; the rotary embedding depends on the length of the
            text; depths have different numbers of heads; for vLLM, a depth reads some heads of another depth, or
            MLPs have different numbers of neurons; for SGLang, attention has a soft-cap.
    """
    if engine == "sglang" and blueprint.arch.attention_softcap is not None:
        got = f"{blueprint.arch.attention_softcap}"
        _refuse(engine, "attention without a soft-cap", got, "serve it with vLLM or refold")
    sizes = {"key-value heads": head_counts(blueprint)}
    if engine == "vllm":
        sizes["neurons"] = neuron_counts(blueprint)
    for what, counts in sizes.items():
        if len(counts) > 1:
            _refuse(engine, f"the same number of {what} at every depth", ", ".join(map(str, counts)))
    for index, depth in enumerate(blueprint.depths):
        if depth.mixer is None:
            continue
        mixer = blueprint.mixers[depth.mixer].mixer
        if not mixer.is_native:
            _refuse(engine, "attention at every depth that has a mixer", f"depth {index}: {mixer.type}")
        if depth.prefix:
            _refuse(engine, "attention to tokens alone", f"depth {index} has a prefix")
        if depth.rope is not None and depth.rope.kind == "dynamic":
            got = f"depth {index} has rope kind dynamic, which depends on the length of the text"
            _refuse(engine, "a rotary embedding that is the same for all texts", got)
        if depth.kv and engine == "vllm":
            _require_all_heads(blueprint, index)


def require_split(blueprint: Blueprint, num_shares: int) -> None:
    """Checks that a stack can be split among processes by heads and by the width of the MLP.

    Args:
        blueprint: The stack.
        num_shares: Processes of tensor parallelism.

    Raises:
        RefoldError: A size is not divisible, or a norm covers all heads.
    """
    arch = widest_arch(blueprint)
    where = "tensor_parallel_size"
    if arch.num_attention_heads % num_shares:
        raise RefoldError(
            f"{where}: a divisor of {arch.num_attention_heads} attention heads is required (got {num_shares}); "
            f"choose one"
        )
    if arch.num_key_value_heads % num_shares and num_shares % arch.num_key_value_heads:
        raise RefoldError(
            f"{where}: a divisor or a multiple of {arch.num_key_value_heads} key-value heads is required "
            f"(got {num_shares}); choose one"
        )
    if arch.intermediate_size % num_shares:
        raise RefoldError(
            f"{where}: a divisor of the MLP's width {arch.intermediate_size} is required (got {num_shares}); choose one"
        )
    if num_shares > 1 and arch.qk_norm == "full":
        raise RefoldError(
            f"{where}: 1 is required where queries are normed over all heads at once ({arch.family}; got "
            f"{num_shares}); use data parallelism"
        )


def shared_depth(blueprint: Blueprint, index: int) -> int | None:
    """Returns the depth whose keys and values a depth reads; None where it makes its own."""
    return blueprint.depths[index].kv[0].depth if blueprint.depths[index].kv else None


def _require_all_heads(blueprint: Blueprint, index: int) -> None:
    depth, every = blueprint.depths[index], set(range(blueprint.arch.num_key_value_heads))
    source = depth.kv[0]
    if len(depth.kv) > 1 or set(source.heads) != every or blueprint.made_heads(index):
        got = f"depth {index} reads heads {list(source.heads)} of depth {source.depth}, and makes or reads others"
        _refuse("vllm", "keys and values of one depth", got, "set share_kv.heads: all")
    if set(blueprint.made_heads(source.depth)) != every:
        got = f"depth {index} reads depth {source.depth}, which does not make all heads"
        _refuse("vllm", "a source that makes all its keys and values", got, "let both read the first")


def _refuse(engine: str, required: str, got: str, mend: str = "serve it with refold's engine") -> None:
    raise RefoldError(f"{engine}: {required} is required (got {got}); {mend}")
