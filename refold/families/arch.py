"""What a decoder-only transformer is, as data: all that the model, the cost and the converter need to know of one."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Annotated[int, Field(gt=0)]


class Frozen(BaseModel):
    """Base of all descriptions: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Norm(Frozen):
    """A normalisation over the hidden dimension: `rms`, or `layer` (mean removed as well)."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    """Added to the stored weight before it scales (Gemma stores `weight - 1`)."""
    bias: bool = False
    float32_scale: bool = False
    """Of `rms`: whether the weight scales before the result is rounded to the model's dtype (Gemma, OLMo 2), or after
    (Llama)."""


class Rope(Frozen):
    """Rotary position embedding. Names follow transformers' `rope_parameters`."""

    kind: Literal["default", "linear", "llama3", "dynamic", "yarn"] = "default"
    theta: float = 10000.0
    rotary_dim: int
    """How many of a head's dimensions are rotated (all of them unless the source rotates partially)."""
    scaling: dict[str, Any] = Field(default_factory=dict)
    """The further numbers of a kind, such as `factor` or `low_freq_factor`."""
    float32_turn: bool = False
    """Whether queries and keys are turned in float32 and then rounded (OLMo 2), or in the model's dtype."""

    def __hash__(self) -> int:
        return hash((self.kind, self.theta, self.rotary_dim, repr(sorted(self.scaling.items())), self.float32_turn))


class Layer(Frozen):
    """What differs between the layers of a source without being a weight."""

    window: Annotated[int, Field(gt=0)] | None = None
    """Number of tokens a token may look back to, itself included; None: all of them."""
    rope: Rope | None = None


class ArchSpec(Frozen):
    """A source architecture.

    Every field selects a small part when the model is built; no family's name appears in its forward pass.
    """

    family: str
    """The source's `model_type`; only reading and dense export look at it."""
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
    """`parallel`: mixer and MLP both read the depth's input (GPT-NeoX); `sequential`: the MLP reads after the mixer."""
    input_norms: bool = True
    """Whether mixer and MLP norm what they read (all but OLMo 2)."""
    output_norms: bool = False
    """Whether the outputs of mixer and MLP are normed before the residual sum: with input norms Gemma 2's sandwich,
    without them OLMo 2."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """Norm of queries and keys: over each head (Qwen3) or over all heads at once (OLMo 2)."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float
    """What scores are multiplied by, usually `head_dim ** -0.5`."""
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
