"""Reading fields of a raw `config.json` as transformers 4 and 5 write them."""

from collections.abc import Mapping
from typing import Any

from refold.errors import SourceError
from refold.families.arch import Layer, Rope

ROPE_KINDS = ("default", "linear", "llama3")
ROPE_ALIASES = {"su": "longrope"}
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu")


def require(config: Mapping[str, Any], key: str) -> Any:
    """Returns a field that has no default; raises SourceError where it is missing."""
    if config.get(key) is None:
        raise SourceError(
            f"config.json: `{key}` is required (not there); is this a complete {config.get('model_type')} folder?"
        )
    return config[key]


def read_or(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """Returns a field, or its default where it is missing or null."""
    value = config.get(key)
    return default if value is None else value


def read_activation(config: Mapping[str, Any], key: str, default: str) -> str:
    name = read_or(config, key, default)
    if name not in ACTIVATIONS:
        raise SourceError(f"config.json: {key}: must be one of {', '.join(ACTIVATIONS)} (got {name!r})")
    return name


def read_rope(
    config: Mapping[str, Any],
    head_dim: int,
    default_theta: float = 10000.0,
    theta_key: str = "rope_theta",
    partial: float = 1.0,
) -> Rope:
    """Reads one rope description from `rope_parameters` (v5) or from `rope_theta` and `rope_scaling` (v4).

    Args:
        config: Raw `config.json`.
        head_dim: Size of a head.
        default_theta: Base where the config names none.
        theta_key: Name of the base in v4 configs.
        partial: Share of a head that is rotated where the config names none.
    """
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    kind = ROPE_ALIASES.get(kind, kind)
    if kind not in ROPE_KINDS:
        raise SourceError(f"config.json: rope kind must be one of {', '.join(ROPE_KINDS)} (got {kind!r})")
    theta = given.pop("rope_theta", None)
    theta = config.get(theta_key) if theta is None else theta
    share = given.pop("partial_rotary_factor", None)
    rotary_dim = int(head_dim * (partial if share is None else share))
    if kind == "default":
        given = {}
    if kind == "linear":
        given = {"factor": given.get("factor", 1.0)}
    return Rope(kind=kind, theta=float(default_theta if theta is None else theta), rotary_dim=rotary_dim, scaling=given)


def write_rope(rope: Rope, head_dim: int) -> dict[str, Any]:
    """The inverse of `read_rope`: transformers 5 `rope_parameters`."""
    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta, **rope.scaling}
    if rope.rotary_dim != head_dim:
        parameters["partial_rotary_factor"] = rope.rotary_dim / head_dim
    return parameters


def same_layers(num_layers: int, window: int | None, rope: Rope | None) -> tuple[Layer, ...]:
    """The layers of an architecture that has only one kind of them."""
    return tuple(Layer(window=window, rope=rope) for _ in range(num_layers))


def only_layer(layers: tuple[Layer, ...], family: str) -> Layer:
    """The one kind of layer an architecture of equal layers has; raises where windows or ropes differ."""
    if len(set(layers)) != 1:
        raise SourceError(f"{family}: all layers must have one window and one rope to be written as {family}")
    return layers[0]
