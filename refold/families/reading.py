"""Reads fields of `config.json`: their kinds and bounds, with defaults and spellings of each version."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from refold.errors import SourceError
from refold.families.arch import ArchSpec, Layer, Rope
from refold.suggest import must_be_one_of, shorten

Requirement = tuple[str, Callable[[Any], bool]]
"""A requirement on a value: its words in a message, and the function that checks the value."""


def _whole(most: int, least: int = 1) -> Requirement:
    words = f"a whole number from {least:,}" if least != 1 else "a positive whole number"
    return f"{words}, at most {most:,}", lambda value: type(value) is int and least <= value <= most


def _number(least: float, most: float) -> Requirement:
    return f"a number from {least:g} to {most:g}", lambda value: type(value) in (int, float) and least <= value <= most


def _kind(words: str, *kinds: type) -> Requirement:
    return words, lambda value: isinstance(value, kinds)


_SIZE, _POSITIONS = _whole(2**24), _whole(2**40)
_FLAG, _NAME, _OBJECT = _kind("true or false", bool), _kind("a text", str), _kind("an object", dict)
_SCALE, _ANY_NUMBER = _number(1e-30, 1e30), _number(-1e30, 1e30)
"""Bounds whose squares are finite in float32."""

FIELDS: Mapping[str, Requirement] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_key_value_heads"), _SIZE),
    # Generous bounds: no model on the hub reaches a tenth of these.
    "num_hidden_layers": _whole(1024),
    "num_attention_heads": _whole(2**16),
    "max_position_embeddings": _POSITIONS,
    "sliding_window": _POSITIONS,
    "sliding_window_pattern": _whole(1024),
    "max_window_layers": _whole(2**24, least=0),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps"), _number(0.0, 1.0)),
    "initializer_range": _number(0.0, 1e6),
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "rope_local_base_freq", "query_pre_attn_scalar"), _SCALE),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _SCALE),
    **dict.fromkeys(("rotary_pct", "partial_rotary_factor"), _number(1e-6, 1.0)),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "use_parallel_residual"), _FLAG),
    **dict.fromkeys(("use_sliding_window", "use_bidirectional_attention"), _FLAG),
    **dict.fromkeys(("hidden_act", "hidden_activation"), _NAME),
    **dict.fromkeys(("rope_parameters", "rope_scaling", "text_config"), _OBJECT),
    "layer_types": _kind("a list", list),
}
ROPE_FIELDS: Mapping[str, Requirement] = {
    **dict.fromkeys(("rope_type", "type"), _NAME),
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor"), _SCALE),
    **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), _ANY_NUMBER),
    "original_max_position_embeddings": _number(1.0, 1e12),
    "partial_rotary_factor": _number(1e-6, 1.0),
    "truncate": _FLAG,
    **dict.fromkeys(("full_attention", "sliding_attention"), _OBJECT),
}


def check_fields(config: Mapping[str, Any], where: str = "") -> None:
    """Checks the type and the bounds of each field that families read; null is allowed.

    Args:
        config: The raw config, or its `text_config`.
        where: Prefix of field names in messages.

    Raises:
        SourceError: A field has the wrong type, or is out of bounds.
    """
    _check(config, FIELDS, where)
    for key in ("rope_parameters", "rope_scaling"):
        given = config.get(key) or {}
        _check(given, ROPE_FIELDS, f"{where}{key}.")
        for kind, part in given.items():
            # A family whose layers differ in their rope has one object for each kind of layer.
            if isinstance(part, dict):
                _check(part, ROPE_FIELDS, f"{where}{key}.{kind}.")
    for index, kind in enumerate(config.get("layer_types") or ()):
        if not isinstance(kind, str):
            raise SourceError(f"config.json: `{where}layer_types[{index}]` must be a text (got {shorten(kind)})")
    if config.get("text_config"):
        check_fields(config["text_config"], f"{where}text_config.")


def _check(given: Mapping[str, Any], fields: Mapping[str, Requirement], where: str) -> None:
    for key, value in given.items():
        if value is None or key not in fields:
            continue
        words, is_right = fields[key]
        if not is_right(value):
            raise SourceError(f"config.json: `{where}{key}` must be {words} (got {shorten(value)}); mend the config")


# The required numbers of each rope kind. Of all other numbers in a config only ROPE_OPTIONS have an effect.
ROPE_KINDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
}
ROPE_OPTIONS = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
LAYER_TYPES = ("full_attention", "sliding_attention")
DEFAULT_THETA = 10000.0
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu")


def require(config: Mapping[str, Any], key: str) -> int:
    """Returns a size without a default; raises SourceError if it is missing or not a positive whole number."""
    if config.get(key) is None:
        raise SourceError(
            f"config.json: `{key}` is required (not there); is this a complete {config.get('model_type')} folder?"
        )
    return read_size(config, key, 0)


def read_size(config: Mapping[str, Any], key: str, default: int) -> int:
    """Returns a size, or its default; raises SourceError if it is not a positive whole number."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SourceError(f"config.json: `{key}` must be a positive whole number (got {shorten(value)})")
    return value


def read_or(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """Returns a field, or its default if the field is missing or null."""
    value = config.get(key)
    return default if value is None else value


def read_activation(config: Mapping[str, Any], key: str, default: str) -> str:
    name = read_or(config, key, default)
    if name not in ACTIVATIONS:
        raise SourceError(f"config.json: {key}: {must_be_one_of(name, ACTIVATIONS)}")
    return name


def read_decoder(
    config: Mapping[str, Any],
    *,
    max_positions: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    is_grouped: bool = True,
    is_tied: bool = False,
) -> dict[str, Any]:
    """Reads the fields with the same name in all decoders of transformers.

    Args:
        config: Raw `config.json`.
        max_positions: The family's default of `max_position_embeddings`.
        kv_heads: The family's default of `num_key_value_heads`; None: the number of heads. If the config holds null,
            the number of heads is used in every family.
        head_dim: The family's default of `head_dim`; None: the hidden size divided by the number of heads.
        is_grouped: Whether the family has `num_key_value_heads` and `head_dim`; if not, they are not read.
        is_tied: The family's default of `tie_word_embeddings`.

    Returns:
        The size fields of an ArchSpec, with the attention scale `head_dim ** -0.5`.

    Raises:
        SourceError: A size is missing or not a positive whole number.
    """
    hidden_size = require(config, "hidden_size")
    heads = require(config, "num_attention_heads")
    own_head = hidden_size // heads
    if kv_heads is None or "num_key_value_heads" in config:
        kv_heads = heads
    if is_grouped:
        kv_heads = read_size(config, "num_key_value_heads", kv_heads)
        own_head = read_size(config, "head_dim", own_head if head_dim is None else head_dim)
    if not own_head:
        raise SourceError(
            f"config.json: `hidden_size` must be at least num_attention_heads (got {hidden_size} and {heads})"
        )
    return {
        "vocab_size": require(config, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": require(config, "intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": own_head,
        "max_position_embeddings": read_size(config, "max_position_embeddings", max_positions),
        "attention_scale": own_head**-0.5,
        "tied_head": read_or(config, "tie_word_embeddings", is_tied),
        "initializer_range": read_or(config, "initializer_range", 0.02),
    }


def write_decoder(arch: ArchSpec, *, is_grouped: bool = True, activation_key: str = "hidden_act") -> dict[str, Any]:
    """Writes the fields that `read_decoder` reads, and the activation."""
    grouped = {"num_key_value_heads": arch.num_key_value_heads, "head_dim": arch.head_dim}
    return {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        **(grouped if is_grouped else {}),
        "max_position_embeddings": arch.max_position_embeddings,
        "tie_word_embeddings": arch.tied_head,
        "initializer_range": arch.initializer_range,
        activation_key: arch.activation,
    }


def read_rope(
    config: Mapping[str, Any],
    head_dim: int,
    max_position_embeddings: int,
    theta_key: str = "rope_theta",
    partial: float | None = None,
    default_theta: float = DEFAULT_THETA,
    kinds: Sequence[str] = tuple(ROPE_KINDS),
) -> Rope:
    """Reads one rope description from `rope_parameters` (v5) or from `rope_theta` and `rope_scaling` (v4).

    Args:
        config: Raw `config.json`.
        head_dim: Size of a head.
        max_position_embeddings: Default of `original_max_position_embeddings` for `llama3` and `yarn`.
        theta_key: Name of the base in v4 configs.
        partial: Default of `partial_rotary_factor`; None: the family always rotates whole heads and ignores the config,
            as transformers does.
        default_theta: Default of the base.
        kinds: Rope kinds of the family.

    Raises:
        SourceError: An unsupported kind, or one of its numbers is missing.
    """
    # If both exist, transformers reads `rope_scaling`.
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    if kind not in kinds:
        raise SourceError(f"config.json: rope kind {must_be_one_of(kind, kinds)}")
    theta = given.pop("rope_theta", None)
    theta = config.get(theta_key) if theta is None else theta
    if kind in ("llama3", "yarn") and given.get("original_max_position_embeddings") is None:
        given["original_max_position_embeddings"] = max_position_embeddings
    missing = [name for name in ROPE_KINDS[kind] if given.get(name) is None]
    if missing:
        raise SourceError(f"config.json: rope kind {kind} needs {', '.join(missing)} (not there)")
    share = 1.0 if partial is None else read_or(given, "partial_rotary_factor", partial)
    return Rope(
        kind=kind,
        theta=float(default_theta if theta is None else theta),
        rotary_dim=int(head_dim * share),
        scaling={name: given[name] for name in ROPE_KINDS[kind]}
        | {name: given[name] for name in ROPE_OPTIONS.get(kind, ()) if given.get(name) is not None},
    )


def write_rope(rope: Rope, head_dim: int) -> dict[str, Any]:
    """Writes a rope as `rope_parameters` of transformers 5."""
    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta, **rope.scaling}
    if rope.rotary_dim != head_dim:
        parameters["partial_rotary_factor"] = rotary_share(rope, head_dim)
    return parameters


def rotary_share(rope: Rope, head_dim: int) -> float:
    """Returns the rotated share of a head, such that `int(head_dim * share)` is exactly `rotary_dim`."""
    share = rope.rotary_dim / head_dim
    return share if int(head_dim * share) == rope.rotary_dim else math.nextafter(share, 1.0)


def read_windows(
    config: Mapping[str, Any], window: int | None, is_sliding: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """Returns the window of each layer, for families whose layers have different windows.

    Args:
        config: Raw `config.json`; its `layer_types`, if present, select the layers with a window.
        window: The window of sliding layers.
        is_sliding: Selects the sliding layers of a config without `layer_types`.

    Raises:
        SourceError: `layer_types` has a wrong length or an unknown entry, or sliding layers have no window.
    """
    num_layers = require(config, "num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = [LAYER_TYPES[is_sliding(layer)] for layer in range(num_layers)]
    if len(kinds) != num_layers:
        raise SourceError(f"config.json: layer_types: one of each layer is required (got {len(kinds)} of {num_layers})")
    for kind in kinds:
        if kind not in LAYER_TYPES:
            raise SourceError(f"config.json: layer_types: {must_be_one_of(kind, LAYER_TYPES)}")
    if window is None and "sliding_attention" in kinds:
        raise SourceError("config.json: `sliding_window` is required by the sliding_attention layers (got None)")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def write_windows(layers: tuple[Layer, ...], family: str) -> dict[str, Any]:
    """Writes the fields that `read_windows` reads; raises SourceError if windows have different sizes."""
    windows = sorted({layer.window for layer in layers if layer.window is not None})
    if len(windows) > 1:
        raise SourceError(f"{family}: all windows must have one size to be written as {family} (got {windows})")
    return {
        "sliding_window": windows[0] if windows else None,
        "layer_types": [LAYER_TYPES[layer.window is not None] for layer in layers],
    }


def only_rope(layers: tuple[Layer, ...], family: str) -> Rope:
    """Returns the rope that all layers share; raises SourceError if ropes differ."""
    rope, *others = {layer.rope for layer in layers}
    if others or rope is None:
        raise SourceError(f"{family}: all layers must have one rope to be written as {family}")
    return rope


def same_layers(num_layers: int, window: int | None, rope: Rope | None) -> tuple[Layer, ...]:
    """Returns the layers of an architecture whose layers are all alike."""
    return tuple(Layer(window=window, rope=rope) for _ in range(num_layers))


def only_layer(layers: tuple[Layer, ...], family: str) -> Layer:
    """Returns the layer that all layers equal; raises SourceError if windows or ropes differ."""
    if len(set(layers)) != 1:
        raise SourceError(f"{family}: all layers must have one window and one rope to be written as {family}")
    return layers[0]
