"""Fields of a raw `config.json`, read as transformers 4 and 5 write them, and written as 5 does."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from refold.errors import SourceError
from refold.families.arch import ArchSpec, Layer, Rope
from refold.suggest import must_be_one_of, shorten

# The numbers each kind needs; of what else a config carries beside them only ROPE_OPTIONS have an effect.
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
    """Returns a size that has no default; raises SourceError where it is missing or no positive whole number."""
    if config.get(key) is None:
        raise SourceError(
            f"config.json: `{key}` is required (not there); is this a complete {config.get('model_type')} folder?"
        )
    return read_size(config, key, 0)


def read_size(config: Mapping[str, Any], key: str, default: int) -> int:
    """Returns a size, or its default; raises SourceError where it is no positive whole number."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SourceError(f"config.json: `{key}` must be a positive whole number (got {shorten(value)})")
    return value


def read_or(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """Returns a field, or its default where it is missing or null."""
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
    """Reads the fields that decoders of transformers name alike.

    Args:
        config: Raw `config.json`.
        max_positions: What the family takes where the config names none.
        kv_heads: The same, for the number of key-value heads; None: as many as there are heads. Null in the config
            says as many as there are heads in every family.
        head_dim: The same, for the size of a head; None: the hidden size shared out over the heads.
        is_grouped: Whether the family has these two fields at all; if not, they are not read.
        is_tied: Whether the head is the embedding where the config does not say.

    Returns:
        ArchSpec's fields of sizes, with the usual attention scale.

    Raises:
        SourceError: A size is missing or no positive whole number.
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
    """The inverse of `read_decoder`, and the fields that need no defaults of a family."""
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
        max_position_embeddings: Stands for the original one where `llama3` or `yarn` name none.
        theta_key: Name of the base in v4 configs.
        partial: Share of a head that is rotated where the config names none; None: this family rotates whole heads,
            whatever the config says, as transformers does.
        default_theta: The base where the config names none.
        kinds: Those the family has.

    Raises:
        SourceError: A kind that refold does not run, or one of its numbers is missing.
    """
    # In this order, as transformers reads them where both are there.
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
    """The inverse of `read_rope`: transformers 5 `rope_parameters`."""
    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta, **rope.scaling}
    if rope.rotary_dim != head_dim:
        parameters["partial_rotary_factor"] = rotary_share(rope, head_dim)
    return parameters


def rotary_share(rope: Rope, head_dim: int) -> float:
    """The share of a head that is rotated, such that its product with `head_dim`, cut to a whole number, is exact."""
    share = rope.rotary_dim / head_dim
    return share if int(head_dim * share) == rope.rotary_dim else math.nextafter(share, 1.0)


def read_windows(
    config: Mapping[str, Any], window: int | None, is_sliding: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """Returns the window of each layer, of a family whose layers differ in it.

    Args:
        config: Raw `config.json`; its `layer_types` decide where they are there.
        window: That of sliding layers.
        is_sliding: Whether a layer slides where the config has no `layer_types`.

    Raises:
        SourceError: `layer_types` has another length, a kind refold does not run, or sliding layers without a window.
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
    """The inverse of `read_windows`; raises where more than one window occurs."""
    windows = sorted({layer.window for layer in layers if layer.window is not None})
    if len(windows) > 1:
        raise SourceError(f"{family}: the sizes of windows must be at most one (got {windows})")
    return {
        "sliding_window": windows[0] if windows else None,
        "layer_types": [LAYER_TYPES[layer.window is not None] for layer in layers],
    }


def only_rope(layers: tuple[Layer, ...], family: str) -> Rope:
    """The one rope of an architecture whose layers may differ in windows alone; raises where ropes differ."""
    rope, *others = {layer.rope for layer in layers}
    if others or rope is None:
        raise SourceError(f"{family}: all layers must have one rope to be written as {family}")
    return rope


def same_layers(num_layers: int, window: int | None, rope: Rope | None) -> tuple[Layer, ...]:
    """The layers of an architecture that has only one kind of them."""
    return tuple(Layer(window=window, rope=rope) for _ in range(num_layers))


def only_layer(layers: tuple[Layer, ...], family: str) -> Layer:
    """The one kind of layer an architecture of equal layers has; raises where windows or ropes differ."""
    if len(set(layers)) != 1:
        raise SourceError(f"{family}: all layers must have one window and one rope to be written as {family}")
    return layers[0]
