"""Contents of files whose layers are the depths of a model: dense architectures, and `deci` for dropped parts."""

from dataclasses import replace

from refold.blueprint.schema import Blueprint, DepthSpec
from refold.exporting.gguf.blocks import (
    block_tensors,
    cap_fields,
    layout_obstacles,
    outside_tensors,
    query_factor,
    size_fields,
)
from refold.exporting.gguf.contents import FieldValue, GgufContents, GgufTensor
from refold.exporting.gguf.layouts import ATTENTION, GATED_MLP, GgufLayout
from refold.exporting.gguf.rotary_fields import rotary_fields, rotary_obstacles
from refold.exporting.gguf.windows import window_fields, window_obstacles
from refold.exporting.target import Obstacle
from refold.exporting.unrolled import dense_arch, dense_obstacles, kept_depths
from refold.families.arch import ArchSpec, Layer, Rope

DECI = GgufLayout("deci", turns_heads=True, has_rope_factors=True)
NARROW_MLP = 32
"""Width of the zero MLP beside attention whose MLP is dropped: one block of the number formats."""
LOCAL_ROPE_BASE = 10000.0
"""llama.cpp's default base in layers with a window, in `gemma3`."""
APPROXIMATE_GELU = (
    "llama.cpp computes GELU by its tanh approximation, from a table in half precision on the CPU: logits differ from "
    "the model's by some thousandths"
)


def unrolled_obstacles(blueprint: Blueprint, layout: GgufLayout) -> list[Obstacle]:
    """Returns the reasons why a layout cannot hold the unrolled stack."""
    found = dense_obstacles(blueprint)
    if found:
        return found
    arch = dense_arch(blueprint)
    found = layout_obstacles(arch, layout)
    found += window_obstacles(arch.layers, layout)
    ropes = file_ropes(arch, layout)
    if len(ropes) > 1:
        found.append(Obstacle("one rotary embedding in all layers", f"{len(ropes)} of them", ""))
    for rope in ropes:
        found += rotary_obstacles(rope, layout.has_rope_factors)
    return found


def file_ropes(arch: ArchSpec, layout: GgufLayout) -> list[Rope]:
    """Returns the different ropes of layers; in `gemma3`, layers with a window have a key of their own for theirs."""
    layers = [layer for layer in arch.layers if not (layout.name == "gemma3" and layer.window is not None)]
    return list(dict.fromkeys(layer.rope for layer in layers or arch.layers if layer.rope is not None))


def unrolled_contents(blueprint: Blueprint, layout: GgufLayout) -> GgufContents:
    """Returns the contents of a file of a dense architecture; a dropped part takes its full size, in zeros."""
    arch = dense_arch(blueprint)
    depths = kept_depths(blueprint)
    factor = query_factor(arch, layout, len(depths))
    tensors = [*outside_tensors(arch, layout)]
    for block, depth in enumerate(depths):
        tensors += block_tensors(arch, layout, block, depth, tuple(layout.tensors), factor)
    return finished(arch, layout, tensors, size_fields(arch, len(depths), 0))


def pruned_contents(blueprint: Blueprint) -> GgufContents:
    """Returns the contents of a `deci` file, whose layers can lack attention and have widths of their own.

    An MLP dropped beside kept attention becomes a narrow MLP of zeros: llama.cpp leaves a layer without an MLP before
    it adds the attention to the residual stream. The first layer must have heads, because llama.cpp reads the size of
    a head from it: dropped attention there becomes a linear of zeros, which `deci` computes instead of attention.
    """
    arch, depths = dense_arch(blueprint), kept_depths(blueprint)
    tensors, heads, groups, widths = [*outside_tensors(arch, DECI)], [], [], []
    for block, index in enumerate(depths):
        depth = blueprint.depths[index]
        mixer, mlp = blueprint.part_arch("mixer", depth.mixer), blueprint.part_arch("mlp", depth.mlp)
        own = mixer.model_copy(update={"intermediate_size": mlp.intermediate_size, "layers": arch.layers})
        tensors += block_tensors(own, DECI, block, index, _stored_names(depth))
        if depth.mixer is None and block == 0:
            tensors += _zero_linear(arch)
        if depth.mlp is None:
            tensors += _zero_mlp(arch, block)
        heads.append(own.num_attention_heads if depth.mixer is not None or block == 0 else 0)
        groups.append(0 if depth.mixer is None else own.num_key_value_heads)
        widths.append(NARROW_MLP if depth.mlp is None else own.intermediate_size)
    fields = size_fields(arch, len(depths), 0) | {
        "{arch}.attention.head_count": heads,
        "{arch}.attention.head_count_kv": groups,
        "{arch}.feed_forward_length": widths,
    }
    contents = replace(finished(arch, DECI, tensors, fields), has_own_widths=True)
    notes = []
    if any(blueprint.depths[index].mlp is None for index in depths):
        notes.append(
            f"a dropped MLP beside kept attention is stored as {NARROW_MLP} neurons of zeros, because llama.cpp loses "
            f"the attention of a layer without an MLP"
        )
    if blueprint.depths[depths[0]].mixer is None:
        notes.append("the dropped attention of the first layer is stored as one linear of zeros: llama.cpp needs heads")
    return replace(contents, notes=(*contents.notes, *notes))


def finished(
    arch: ArchSpec, layout: GgufLayout, tensors: list[GgufTensor], fields: dict[str, FieldValue]
) -> GgufContents:
    """Returns the contents with the keys about windows, rotary embedding and soft-caps added.

    Args:
        arch: The architecture, with the layers of the file.
        layout: Its layout in llama.cpp.
        tensors: All tensors but the factors of the rotary embedding.
        fields: The keys about sizes.
    """
    windows = window_fields(arch, arch.layers, layout)
    fields = {**fields, **windows.fields, **cap_fields(arch), "{arch}.context_length": windows.context}
    turns = [rotary_fields(rope) for rope in file_ropes(arch, layout)[:1]]
    for each in turns:
        fields |= each.fields
    if layout.name == "gemma3":
        fields |= _local_fields(arch.layers)
    if layout.name == "gptneox":
        fields["{arch}.use_parallel_residual"] = arch.residual == "parallel"
    notes = [note for each in turns for note in each.notes]
    if arch.activation.startswith("gelu"):
        notes.append(APPROXIMATE_GELU)
    extra = tuple(tensor for each in turns for tensor in each.tensors)
    return GgufContents(layout.name, fields, (*tensors, *extra), (*windows.notes, *notes))


def _local_fields(layers: tuple[Layer, ...]) -> dict[str, FieldValue]:
    local = [layer.rope for layer in layers if layer.window is not None and layer.rope is not None]
    if not local or local[0].theta == LOCAL_ROPE_BASE:
        return {}
    return {"{arch}.rope.freq_base_swa": float(local[0].theta)}


def _stored_names(depth: DepthSpec) -> tuple[str, ...]:
    attention = ("attn_norm", *ATTENTION) if depth.mixer is not None else ()
    return (*attention, *(("ffn_norm", *GATED_MLP) if depth.mlp is not None else ()))


def _zero_linear(arch: ArchSpec) -> list[GgufTensor]:
    return [
        GgufTensor("blk.0.attn_norm.weight", (arch.hidden_size,), fill=1.0, is_float32=True),
        GgufTensor("blk.0.attn_output.weight", (arch.hidden_size, arch.hidden_size)),
    ]


def _zero_mlp(arch: ArchSpec, block: int) -> list[GgufTensor]:
    rows = (NARROW_MLP, arch.hidden_size)
    return [
        GgufTensor(f"blk.{block}.ffn_norm.weight", (arch.hidden_size,), fill=1.0, is_float32=True),
        GgufTensor(f"blk.{block}.ffn_gate.weight", rows),
        GgufTensor(f"blk.{block}.ffn_up.weight", rows),
        GgufTensor(f"blk.{block}.ffn_down.weight", rows[::-1]),
    ]
