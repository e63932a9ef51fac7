"""Tensors and keys of unrolled blocks: each layer of the file has the weights of one depth, everything merged."""

from collections.abc import Iterator, Mapping, Sequence

from refold.blueprint.source_tensors import canonical_tensors
from refold.exporting.gguf.contents import FieldValue, GgufTensor, WeightPiece
from refold.exporting.gguf.layouts import GgufLayout
from refold.exporting.target import Obstacle
from refold.families.arch import ArchSpec
from refold.mixers.spec import Shape


def layout_obstacles(arch: ArchSpec, layout: GgufLayout) -> list[Obstacle]:
    """Returns the properties of an architecture that a layout of llama.cpp does not compute.

    Args:
        arch: The architecture of the source.
        layout: The layout.
    """
    name, found = layout.name, []

    def require(holds: bool, required: str, got: object) -> None:
        if not holds:
            found.append(Obstacle(f"{required}, as {name} has", f"got {got}", ""))

    require(arch.activation in layout.activations, f"activation {layout.activations[0]}", arch.activation)
    require((arch.norm.kind == "layer") == (name == "gptneox"), "its kind of norm", arch.norm.kind)
    require(arch.gated_mlp == ("mlp.gate_proj" in _stems(layout)), "its kind of MLP", f"gated: {arch.gated_mlp}")
    require(arch.residual == "sequential" or name == "gptneox", "a sequential residual", arch.residual)
    require(layout.takes_head or arch.tied_head, "a head tied to the embedding", "an untied head")
    width = arch.num_attention_heads * arch.head_dim
    require(not layout.square or width == arch.hidden_size, f"query heads {arch.hidden_size} wide in all", f"{width}")
    scaled = arch.hidden_size**0.5 if layout.embedding_scaled else 1.0
    require(abs(arch.embedding_scale - scaled) < 1e-6 * scaled, "its embedding scale", arch.embedding_scale)
    caps = {"attention": arch.attention_softcap, "logits": arch.logit_softcap}
    for kind, cap in caps.items():
        require(cap is None or kind in layout.softcaps, f"no soft-cap of {kind}", cap)
        require(cap is not None or not layout.forced_softcaps, f"a soft-cap of {kind}", None)
    stems, biased = _stems(layout), _biased(layout)
    for canonical in canonical_tensors(arch):
        pool, _, _ = canonical.partition(".")
        if pool not in ("mixer", "mlp"):
            continue
        stem, _, kind = canonical.rpartition(".")
        require(stem in stems and (kind == "weight" or stem in biased), f"no {canonical}", "one")
    return found


def outside_tensors(arch: ArchSpec, layout: GgufLayout) -> Iterator[GgufTensor]:
    """Yields embedding, final norm and, where the file needs one, the output matrix."""
    table = (arch.vocab_size, arch.hidden_size)
    yield GgufTensor("token_embd.weight", table, (WeightPiece("embed_tokens.weight"),))
    norm = WeightPiece("norm.weight", offset=arch.norm.offset)
    yield GgufTensor("output_norm.weight", (arch.hidden_size,), (norm,), is_float32=True)
    if arch.norm.bias:
        yield GgufTensor("output_norm.bias", (arch.hidden_size,), (WeightPiece("norm.bias"),), is_float32=True)
    if not arch.tied_head:
        yield GgufTensor("output.weight", table, (WeightPiece("lm_head.weight"),))
    elif layout.needs_head:
        yield GgufTensor("output.weight", table, (WeightPiece("embed_tokens.weight"),))


def block_tensors(
    arch: ArchSpec, layout: GgufLayout, block: int, depth: int, names: Sequence[str], query_factor: float = 1.0
) -> Iterator[GgufTensor]:
    """Yields the tensors of one layer of a file.

    Args:
        arch: The architecture of the source.
        layout: Its layout in llama.cpp.
        block: Index of the layer in the file.
        depth: The depth whose weights it has.
        names: The tensors to write, among those of the layout.
        query_factor: Factor on queries that makes up for llama.cpp's scale of the scores.
    """
    shapes = canonical_tensors(arch)
    scaled = scaled_stem(arch)
    for name in names:
        stems = layout.tensors[name]
        for kind in ("weight", "bias"):
            canonicals = [f"{stem}.{kind}" for stem in stems]
            there = [canonical for canonical in canonicals if canonical in shapes]
            full = f"blk.{block}.{name}.{kind}"
            if not there:
                if kind == "bias" and name in layout.forced_biases:
                    yield GgufTensor(full, (sum(shapes[f"{stem}.weight"][0] for stem in stems),), is_float32=True)
                continue
            pieces = tuple(
                WeightPiece(
                    canonical,
                    depth,
                    offset=arch.norm.offset if canonical.endswith("_norm.weight") else 0.0,
                    factor=query_factor if canonical.startswith(f"{scaled}.") else 1.0,
                    rotary_heads=_heads(arch, canonical) if layout.turns_heads else 0,
                )
                for canonical in there
            )
            yield GgufTensor(
                full, _joined([shapes[each] for each in there]), pieces, is_float32=len(shapes[there[0]]) == 1
            )


def size_fields(arch: ArchSpec, num_blocks: int, context: int) -> dict[str, FieldValue]:
    """Returns the keys about sizes that every architecture has."""
    eps = "layer_norm_epsilon" if arch.norm.kind == "layer" else "layer_norm_rms_epsilon"
    return {
        "{arch}.block_count": num_blocks,
        "{arch}.context_length": context,
        "{arch}.embedding_length": arch.hidden_size,
        "{arch}.feed_forward_length": arch.intermediate_size,
        "{arch}.attention.head_count": arch.num_attention_heads,
        "{arch}.attention.head_count_kv": arch.num_key_value_heads,
        "{arch}.attention.key_length": arch.head_dim,
        "{arch}.attention.value_length": arch.head_dim,
        f"{{arch}}.attention.{eps}": arch.norm.eps,
        "{arch}.vocab_size": arch.vocab_size,
    }


def cap_fields(arch: ArchSpec) -> dict[str, FieldValue]:
    """Returns the keys of soft-caps."""
    caps: Mapping[str, float | None] = {
        "{arch}.attn_logit_softcapping": arch.attention_softcap,
        "{arch}.final_logit_softcapping": arch.logit_softcap,
    }
    return {key: float(cap) for key, cap in caps.items() if cap is not None}


def scaled_stem(arch: ArchSpec) -> str:
    """Returns the module whose weights get `query_factor`: the norm of queries, or their linear."""
    return "mixer.q_norm" if "mixer.q_norm.weight" in canonical_tensors(arch) else "mixer.q_proj"


def query_factor(arch: ArchSpec, layout: GgufLayout, num_blocks: int) -> float:
    """Returns the source's scale of attention scores divided by the scale that llama.cpp computes."""
    width = arch.hidden_size // arch.num_attention_heads if num_blocks == layout.odd_scale_layers else arch.head_dim
    factor = arch.attention_scale * width**0.5
    return 1.0 if abs(factor - 1.0) < 1e-9 else factor


def _heads(arch: ArchSpec, canonical: str) -> int:
    if canonical.startswith("mixer.q_proj."):
        return arch.num_attention_heads
    return arch.num_key_value_heads if canonical.startswith("mixer.k_proj.") else 0


def _joined(shapes: Sequence[Shape]) -> Shape:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _stems(layout: GgufLayout) -> set[str]:
    return {stem for stems in layout.tensors.values() for stem in stems}


def _biased(layout: GgufLayout) -> set[str]:
    return {stem for name in layout.biases if name in layout.tensors for stem in layout.tensors[name]}
