"""Types and bounds of the fields of a raw `config.json`, checked once before a family reads them."""

from collections.abc import Callable, Mapping
from typing import Any

from refold.errors import SourceError
from refold.suggest import shorten

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
