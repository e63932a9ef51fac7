"""Base classes of recurrent mixers: reading, convolving, gating and writing queries, keys and values in heads."""

from abc import abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from refold.families.arch import ArchSpec
from refold.mixers.heads import HeadedSpec
from refold.mixers.spec import MixerSpec
from refold.nn.mixers.batch import DepthInputs
from refold.nn.mixers.memory import StateView
from refold.nn.mixers.recurrent import HeadReads, StateMixer
from refold.nn.packed import PackedPart
from refold.nn.part import Lora, OwnVectors
from refold.nn.rotary import rotate
from refold.nn.workshop import Workshop
from refold.ops.convolution import convolve

ACTIVATIONS = {"none": lambda x: x, "silu": nn.functional.silu, "sigmoid": torch.sigmoid}

READS = ("q_proj", "k_proj", "v_proj")
BESIDE = ("g_proj", "gk_proj_down", "dt_proj", "a_proj", "b_proj")
"""Linears of gates, decays and strengths that read the same input as `READS`, where a mixer has them."""


class RecurrentMixer(StateMixer):
    """A recurrent mixer built from its spec.

    Args:
        arch: The source's architecture.
        spec: The resolved mixer.
        stores_vectors: Whether norms, biases and other vectors live here.
    """

    output_linear = "o_proj"
    """The linear of the output projection."""
    conv_activation = "silu"
    """Activation after the short convolution."""

    @classmethod
    def create(cls, arch: ArchSpec, spec: MixerSpec, stores_vectors: bool) -> "RecurrentMixer":
        return cls(arch, spec, stores_vectors)

    @classmethod
    def view(cls, config: PreTrainedConfig, arch: ArchSpec, layer_idx: int, window: int | None) -> StateView:
        return StateView(layer_idx)

    def __init__(self, arch: ArchSpec, spec: MixerSpec, stores_vectors: bool):
        shapes = spec.vectors(arch)
        super().__init__(spec.linears(arch), shapes, arch.norm, stores_vectors, spec.fills(arch))
        self.has_conv_bias, self.has_scale = "conv1d.bias" in shapes, "heads.scale" in shapes
        self.eps = arch.norm.eps

    def write(self, mixed: Float[Tensor, "B T V"], lora: Lora, vectors: OwnVectors) -> Float[Tensor, "B T D"]:
        y = self.project(self.output_linear, mixed, lora, vectors)
        return self.normalise("output_norm", y, vectors)

    def convolve(self, x: Float[Tensor, "B T C"], inputs: DepthInputs, vectors: OwnVectors) -> Float[Tensor, "B T C"]:
        """Runs the short convolution over all channels, with the inputs before this call, and keeps the last ones."""
        weight = self.vector("conv1d.weight", vectors)
        bias = self.vector("conv1d.bias", vectors) if self.has_conv_bias else None
        width = weight.shape[1] - 1
        past = inputs.memory.exchange(x, width, inputs.resets) if width else None
        past = None if past is None else past.transpose(1, 2)
        y = convolve(x, weight, bias, past, inputs.resets)
        return ACTIVATIONS[self.conv_activation](y)

    def normalise_heads(self, y: Tensor, scale: Tensor | None) -> Tensor:
        """Root-mean-square norm over the last dimension, taken in float32."""
        wide = y.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide if scale is None else wide * scale.float()).to(y.dtype)

    def compile_regions(self) -> None:
        self.write = torch.compile(self.write)


class HeadedMixer(RecurrentMixer):
    """A recurrent mixer with queries, keys and values."""

    input_groups = (READS + BESIDE,)
    # Linears that run together with queries, keys and values: none, unless their products are joined.
    _beside: tuple[str, ...] = ()

    def __init__(self, arch: ArchSpec, spec: HeadedSpec, stores_vectors: bool):
        super().__init__(arch, spec, stores_vectors)
        self.layout, self.is_rotary = spec.layout, spec.is_rotary
        self.norm, self.gate, self.input_activation = spec.norm, spec.gate, spec.input_activation
        self.conv_width, self.conv_activation = spec.conv_width, spec.conv_function
        self.num_matrix_heads = self.layout.heads
        self.query_scale = self.layout.key_dim**-0.5

    def matrix(
        self,
        hidden_states: Float[Tensor, "B T D"],
        view: nn.Module,
        inputs: DepthInputs,
        lora: Lora,
        vectors: OwnVectors,
    ) -> Float[Tensor, "B H T T"]:
        reads = self.read_inputs(hidden_states, inputs, lora, vectors)
        return self.write_matrix(reads, inputs.resets, lora, vectors)

    def read_inputs(
        self, hidden_states: Float[Tensor, "B T D"], inputs: DepthInputs, lora: Lora, vectors: OwnVectors
    ) -> HeadReads:
        """Projects queries, keys and values, convolved, rotated and activated as the options say."""
        layout, x = self.layout, self.normalise("input_norm", hidden_states, vectors)
        found = self.project_all(READS + self._beside, x, lora, vectors)
        parts, beside = found[: len(READS)], dict(zip(self._beside, found[len(READS) :], strict=True))
        if self.conv_width:
            joined = self.convolve(torch.cat(parts, dim=-1), inputs, vectors)
            parts = joined.split([part.shape[-1] for part in parts], dim=-1)
        activate = ACTIVATIONS[self.input_activation]
        sizes = (layout.key_dim, layout.key_dim, layout.value_dim)
        query, key, value = (activate(part).unflatten(-1, (-1, size)) for part, size in zip(parts, sizes, strict=True))
        if inputs.rotation is not None and self.is_rotary:
            query, key = rotate(query, inputs.rotation), rotate(key, inputs.rotation)
        return HeadReads(x, query, key, value, beside)

    def project_read(self, name: str, reads: HeadReads, lora: Lora, vectors: OwnVectors) -> Float[Tensor, "B T out"]:
        """Runs one of the linears that read the normed hidden states besides queries, keys and values."""
        found = reads.beside.get(name)
        return self.project(name, reads.x, lora, vectors) if found is None else found

    def pack(self, workshop: Workshop, format: str) -> PackedPart:
        packed = super().pack(workshop, format)
        self._beside = tuple(name for name in BESIDE if name in packed.names)
        return packed

    def widen(self, states: Float[Tensor, "B T G K"]) -> Float[Tensor, "B T H K"]:
        """Repeats each head for all heads of the state that use it."""
        times = self.layout.heads // states.shape[2]
        return states if times == 1 else states.repeat_interleave(times, dim=2)

    @abstractmethod
    def write_matrix(
        self, reads: HeadReads, resets: Bool[Tensor, "B T"] | None, lora: Lora, vectors: OwnVectors
    ) -> Float[Tensor, "B H T T"]:
        """Returns the matrix with which `mix` mixes values."""

    def finish(
        self, reads: HeadReads, mixed: Float[Tensor, "B T H V"], lora: Lora, vectors: OwnVectors
    ) -> Float[Tensor, "B T W"]:
        """Norms, then gates the outputs, all heads side by side."""
        if self.norm == "head":
            mixed = self.normalise_heads(mixed, self.vector("heads.scale", vectors) if self.has_scale else None)
        mixed = mixed.flatten(-2)
        if self.norm == "full":
            mixed = self.normalise_heads(mixed, self.vector("heads.scale", vectors))
        if self.gate == "none":
            return mixed
        return mixed * ACTIVATIONS[self.gate](self.project_read("g_proj", reads, lora, vectors))
