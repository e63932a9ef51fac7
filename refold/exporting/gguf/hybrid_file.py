"""Contents of `granitehybrid` files: Mamba-2 in some layers and attention in the others, with Llama's MLP."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from refold.blueprint.part_sizes import widest_arch
from refold.blueprint.schema import Blueprint
from refold.exporting.gguf.blocks import block_tensors, layout_obstacles, outside_tensors, size_fields
from refold.exporting.gguf.contents import GgufContents, GgufTensor, WeightPiece
from refold.exporting.gguf.layouts import ATTENTION, GATED_MLP, GgufLayout
from refold.exporting.gguf.rotary_fields import rotary_obstacles
from refold.exporting.gguf.unrolled_file import file_ropes, finished
from refold.exporting.target import Obstacle
from refold.exporting.unrolled import dense_obstacles, kept_depths
from refold.families.arch import ArchSpec, Layer
from refold.mixers.mamba2 import Mamba2

_Pair = tuple[int, int]
HYBRID = GgufLayout("granitehybrid", turns_heads=True, has_rope_factors=True)
EXPANSION = 2
"""The width of a state-space layer divided by the hidden size, which llama.cpp requires."""


@dataclass(frozen=True)
class StateSizes:
    """Sizes of the state-space layers of a file, padding included.

    Attributes:
        mixer: The mixer that all of them have.
        times: Heads and groups of the file divided by those of the mixer; those that are added are zero.
    """

    mixer: Mamba2
    times: int

    @property
    def heads(self) -> int:
        return self.mixer.layout.heads * self.times

    @property
    def groups(self) -> int:
        return self.mixer.layout.q_heads * self.times

    @property
    def width(self) -> int:
        return self.mixer.layout.value_width * self.times

    @property
    def shared_width(self) -> int:
        """Width of B, and of C."""
        return self.groups * self.mixer.layout.key_dim


def has_state_space(blueprint: Blueprint) -> bool:
    """Says whether any depth runs Mamba-2."""
    return any(part.mixer.type == "mamba2" for part in blueprint.mixers)


def hybrid_obstacles(blueprint: Blueprint) -> list[Obstacle]:
    """Returns the reasons why `granitehybrid` cannot hold a model with Mamba-2 layers."""
    kinds = {part.mixer.type for part in blueprint.mixers}
    other = kinds - {"attention", "mamba2"}
    found = [each for each in dense_obstacles(blueprint) if other or each.required != "attention at every depth"]
    if found:
        return found
    arch = _stack_arch(blueprint)
    found = layout_obstacles(arch, HYBRID)
    ropes = file_ropes(arch, HYBRID)
    if len(ropes) > 1:
        found.append(Obstacle("one rotary embedding in all layers", f"{len(ropes)} of them", ""))
    for rope in ropes:
        found += rotary_obstacles(rope, HYBRID.has_rope_factors)
    mixers: list[Mamba2] = []
    for part in blueprint.mixers:
        if isinstance(part.mixer, Mamba2) and part.mixer not in mixers:
            mixers.append(part.mixer)
    if len(mixers) > 1:
        found.append(Obstacle("one kind of Mamba-2 in all layers", f"{len(mixers)} kinds", "the same mamba2 options"))
    if "attention" not in kinds:
        found.append(Obstacle("attention in at least one layer", "Mamba-2 in all", "mixers in some layers only"))
    for mixer in mixers:
        found += _mixer_obstacles(arch, mixer)
    return found


def hybrid_contents(blueprint: Blueprint) -> GgufContents:
    """Returns the contents of a `granitehybrid` file.

    llama.cpp requires state-space layers twice as wide as the hidden size; narrower ones are padded with heads and
    groups of zeros, which add nothing.
    """
    arch, depths = _stack_arch(blueprint), kept_depths(blueprint)
    mixer = next(part.mixer for part in blueprint.mixers if isinstance(part.mixer, Mamba2))
    sizes = StateSizes(mixer, EXPANSION * arch.hidden_size // mixer.layout.value_width)
    tensors, groups = [*outside_tensors(arch, HYBRID)], []
    for block, index in enumerate(depths):
        part = blueprint.depths[index].mixer
        is_state = part is not None and blueprint.mixers[part].mixer.type == "mamba2"
        groups.append(0 if is_state else arch.num_key_value_heads)
        names = ("attn_norm", *(() if is_state else ATTENTION), "ffn_norm", *GATED_MLP)
        tensors += block_tensors(arch, HYBRID, block, index, names)
        if is_state:
            tensors += _state_tensors(arch, sizes, block, index)
    fields = size_fields(arch, len(depths), 0) | {
        "{arch}.attention.head_count_kv": groups,
        "{arch}.ssm.conv_kernel": sizes.mixer.conv,
        "{arch}.ssm.inner_size": sizes.width,
        "{arch}.ssm.state_size": sizes.mixer.layout.key_dim,
        "{arch}.ssm.time_step_rank": sizes.heads,
        "{arch}.ssm.group_count": sizes.groups,
        # Granite's switch for rotary embedding in attention layers.
        "{arch}.rope.scaling.finetuned": True,
    }
    contents = finished(arch, HYBRID, tensors, fields)
    if sizes.times == 1:
        return contents
    note = (
        f"state-space layers are padded with zeros from {mixer.layout.value_width} to {sizes.width} channels, because "
        f"llama.cpp requires {EXPANSION} times the hidden size"
    )
    return replace(contents, notes=(*contents.notes, note))


def _mixer_obstacles(arch: ArchSpec, mixer: Mamba2) -> list[Obstacle]:
    layout, found = mixer.layout, []
    if mixer.norm != "group" or mixer.gate != "silu":
        got = f"got norm {mixer.norm}, gate {mixer.gate}"
        found.append(Obstacle("a grouped norm and a silu gate", got, "mamba2 with norm: group, gate: silu"))
    if mixer.conv < 2 or mixer.conv_activation != "silu":
        got = f"got width {mixer.conv}, {mixer.conv_activation}"
        found.append(Obstacle("a short convolution with silu", got, "mamba2 with conv: 4, conv_activation: silu"))
    if layout.q_heads % layout.k_heads:
        got = f"got {layout.q_heads} and {layout.k_heads}"
        found.append(Obstacle("as many key heads as query heads", got, "mamba2 with k_heads: q_heads"))
    if EXPANSION * arch.hidden_size % layout.value_width:
        got = f"got {layout.value_width} of {EXPANSION * arch.hidden_size}"
        required = f"state-space channels that divide {EXPANSION} times the hidden size"
        found.append(Obstacle(required, got, "mamba2 with another value_dim"))
    if arch.qkv_bias or arch.o_bias:
        found.append(Obstacle("Mamba-2 without biases", "the source has some", ""))
    return found


def _stack_arch(blueprint: Blueprint) -> ArchSpec:
    """Returns the architecture with the layers of the file; only attention layers have windows and ropes."""
    depths = [blueprint.depths[index] for index in kept_depths(blueprint)]
    mixing = [
        depth for depth in depths if depth.mixer is not None and blueprint.mixers[depth.mixer].mixer.type == "attention"
    ]
    found = [Layer(window=depth.window, rope=depth.rope) for depth in mixing]
    layers = (*found, *found[:1] * (len(depths) - len(found))) if found else blueprint.arch.layers[: len(depths)]
    return widest_arch(blueprint).model_copy(update={"layers": tuple(layers)})


def _state_tensors(arch: ArchSpec, sizes: StateSizes, block: int, depth: int) -> Iterator[GgufTensor]:
    """Yields the tensors of a state-space layer: rows of z, x, B, C and the time steps in one matrix."""
    layout, prefix = sizes.mixer.layout, f"blk.{block}"
    queries, keys = layout.q_heads * layout.key_dim, layout.k_heads * layout.key_dim
    values = layout.v_heads * layout.value_dim
    repeat_key = (layout.k_heads, layout.q_heads // layout.k_heads)
    repeat_value = (layout.v_heads, layout.heads // layout.v_heads)

    def read(local: str, rows: int, repeat: _Pair | None = None, span: _Pair | None = None) -> WeightPiece:
        return WeightPiece(f"mixer.{local}", depth, span, repeat, rows=rows)

    parts = {
        "v_proj": (sizes.width, repeat_value, (queries + keys, queries + keys + values)),
        "k_proj": (sizes.shared_width, repeat_key, (queries, queries + keys)),
        "q_proj": (sizes.shared_width, None, (0, queries)),
    }
    inputs = [read("g_proj.weight", sizes.width)]
    inputs += [read(f"{name}.weight", rows, repeat) for name, (rows, repeat, _) in parts.items()]
    inputs.append(read("dt_proj.weight", sizes.heads))
    channels = sizes.width + 2 * sizes.shared_width
    yield GgufTensor(f"{prefix}.ssm_in.weight", (sizes.width + channels + sizes.heads, arch.hidden_size), tuple(inputs))
    for kind, tail in (("weight", (sizes.mixer.conv,)), ("bias", ())):
        pieces = tuple(read(f"conv1d.{kind}", rows, repeat, span) for rows, repeat, span in parts.values())
        yield GgufTensor(f"{prefix}.ssm_conv1d.{kind}", (channels, *tail), pieces, is_float32=True)
    yield GgufTensor(f"{prefix}.ssm_dt.bias", (sizes.heads,), (read("dt_bias", sizes.heads),), is_float32=True)
    log = replace(read("A_log", sizes.heads), negative_exp=True)
    yield GgufTensor(f"{prefix}.ssm_a", (sizes.heads, 1), (log,), is_float32=True)
    yield GgufTensor(f"{prefix}.ssm_d", (sizes.heads, 1), (read("D", sizes.heads),), is_float32=True)
    norm = (sizes.groups, sizes.width // sizes.groups)
    yield GgufTensor(f"{prefix}.ssm_norm.weight", norm, (read("heads.scale", sizes.width),), is_float32=True)
    output = WeightPiece("mixer.o_proj.weight", depth, columns=sizes.width)
    yield GgufTensor(f"{prefix}.ssm_out.weight", (arch.hidden_size, sizes.width), (output,))
