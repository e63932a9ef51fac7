"""A decoder-only transformer as data, and a family: how its config is read and its tensors are named."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Annotated[int, Field(gt=0)]


class Frozen(BaseModel):
    """Base class of all data objects that are written to files: immutable, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Norm(Frozen):
    """A normalisation over the hidden dimension: `rms`, or `layer`, which subtracts the mean too."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    """Number added to the stored weight (Gemma stores `weight - 1`)."""
    bias: bool = False
    float32_scale: bool = False
    """For `rms`: whether the product with the weight is computed in float32 and then rounded to the model's dtype
    (Gemma, OLMo 2). Otherwise the normed input is rounded first (Llama)."""


class Rope(Frozen):
    """Rotary position embedding. Names follow transformers' `rope_parameters`."""

    kind: Literal["default", "linear", "llama3", "dynamic", "yarn"] = "default"
    theta: float = 10000.0
    rotary_dim: int
    """Number of rotated dimensions of a head: all, unless the source has partial rotary embedding."""
    scaling: dict[str, Any] = Field(default_factory=dict)
    """Further numbers of the kind, such as `factor` or `low_freq_factor`."""
    float32_turn: bool = False
    """Whether queries and keys are rotated in float32 and then rounded (OLMo 2), or rotated in the model's dtype."""

    def __hash__(self) -> int:
        return hash((self.kind, self.theta, self.rotary_dim, repr(sorted(self.scaling.items())), self.float32_turn))


class Layer(Frozen):
    """Properties of one source layer that are not weights."""

    window: Annotated[int, Field(gt=0)] | None = None
    """Number of latest tokens that a token attends to, itself included; None: all."""
    rope: Rope | None = None


class ArchSpec(Frozen):
    """A source architecture.

    The model is built from these fields alone: its forward pass does not depend on the name of a family.
    """

    family: str
    """The source's `model_type`, used only for reading the source and for dense export."""
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    max_position_embeddings: Size
    layers: tuple[Layer, ...]
    norm: Norm
    activation: str
    gated_mlp: bool = True
    residual: Literal["sequential", "parallel"] = "sequential"
    """`parallel`: mixer and MLP both read the input of the layer (GPT-NeoX). `sequential`: the MLP reads the sum of the
    input and the mixer's output."""
    input_norms: bool = True
    """Whether the inputs of mixer and MLP are normed (all families except OLMo 2)."""
    output_norms: bool = False
    """Whether the outputs of mixer and MLP are normed before the residual sum (Gemma 2 and 3 besides the input norms,
    OLMo 2 instead of them)."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """Norm of queries and keys: over each head (Qwen3) or over all heads at once (OLMo 2)."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float
    """Factor on the attention scores, usually `head_dim ** -0.5`."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    tied_head: bool = False
    initializer_range: float = 0.02

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @model_validator(mode="after")
    def _heads_divide(self) -> "ArchSpec":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: must divide num_attention_heads "
                f"(got {self.num_key_value_heads} and {self.num_attention_heads})"
            )
        return self


Layout = Literal["whole", "rows", "heads"]
"""Layout of the canonical pieces in a source tensor. `whole`: one piece; `rows`: pieces concatenated by rows; `heads`:
for each head the `head_dim` rows of every piece in turn (GPT-NeoX: `[heads, pieces, head_dim]`)."""


@dataclass(frozen=True)
class TensorRule:
    """One source tensor and the canonical pieces inside it.

    Canonical names: `embed_tokens.weight`, `norm.weight`, `lm_head.weight`, and in a layer `mixer.q_proj.weight`,
    `mixer.input_norm.weight`, `mlp.up_proj.bias`, ... A source name with `{layer}` stands for one tensor per layer.
    """

    source: str
    pieces: tuple[str, ...]
    layout: Layout = "whole"

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.source


@dataclass(frozen=True)
class Family:
    """A model family: one file and one entry in the registry."""

    model_type: str
    architecture: str
    """Class name in transformers."""
    url: str
    read_config: Callable[[Mapping[str, Any]], ArchSpec]
    """Converts a raw `config.json` (of transformers 4 or 5) to an ArchSpec, with the family's own defaults."""
    write_config: Callable[[ArchSpec], dict[str, Any]]
    """Converts an ArchSpec to the fields of a transformers 5 `config.json`: the inverse of `read_config`."""
    rules: tuple[TensorRule, ...]
    """All tensors that the family can have. A checkpoint needs only those that its ArchSpec uses (biases and an untied
    head are optional)."""
    spellings: tuple[tuple[TensorRule, ...], ...] = ()
    """The same rules with other tensor names, for families whose checkpoints use several naming schemes. `rules` has
    the names of transformers' modules."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Glob patterns of source tensors that are ignored, each with the reason."""
