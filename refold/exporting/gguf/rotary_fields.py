"""Keys of a GGUF file about rotary position embedding: base, scaling, and factors by frequency."""

import math
from dataclasses import dataclass

from refold.exporting.gguf.contents import FieldValue, GgufTensor
from refold.exporting.target import Obstacle
from refold.families.arch import Rope

BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
"""The values with which both transformers and llama.cpp compute `yarn` scaling if none are given."""


@dataclass(frozen=True)
class RotaryFields:
    """Keys of one rope, `rope_freqs.weight` for scaling that keys cannot express, and notes."""

    fields: dict[str, FieldValue]
    tensors: tuple[GgufTensor, ...] = ()
    notes: tuple[str, ...] = ()


def rotary_obstacles(rope: Rope, has_factors: bool) -> list[Obstacle]:
    """Returns the properties of a rope that llama.cpp cannot compute for an architecture.

    Args:
        rope: The rope.
        has_factors: Whether the architecture reads `rope_freqs.weight`.
    """
    if rope.kind == "llama3" and not has_factors:
        return [Obstacle("rotary scaling other than llama3", "the architecture has no rotary factors", "")]
    if rope.kind == "yarn" and rope.scaling.get("truncate") is False:
        return [Obstacle("yarn scaling with truncate: true", "got false", "")]
    return []


def rotary_fields(rope: Rope) -> RotaryFields:
    """Returns the keys of a rope, with `{arch}` for the architecture."""
    fields: dict[str, FieldValue] = {
        "{arch}.rope.dimension_count": rope.rotary_dim,
        "{arch}.rope.freq_base": float(rope.theta),
    }
    scaling = rope.scaling
    if rope.kind == "linear":
        fields |= _scaling("linear", float(scaling["factor"]))
    if rope.kind == "yarn":
        original = int(scaling["original_max_position_embeddings"])
        fields |= _scaling("yarn", float(scaling["factor"]))
        fields["{arch}.rope.scaling.original_context_length"] = original
        # llama.cpp multiplies its own factor, that of transformers' default, by this one.
        factor = _attention_factor(rope) / _usual_factor(float(scaling["factor"]))
        if factor != 1.0:
            fields["{arch}.rope.scaling.attn_factor"] = factor
        for name, usual in BETAS.items():
            if scaling.get(name, usual) != usual:
                fields[f"{{arch}}.rope.scaling.yarn_{name}"] = float(scaling[name])
    if rope.kind == "llama3":
        values = llama3_factors(rope)
        return RotaryFields(fields, (GgufTensor("rope_freqs.weight", (len(values),), values=values, is_float32=True),))
    if rope.kind == "dynamic":
        note = "dynamic rotary scaling begins behind the context length; llama.cpp does not compute it there"
        return RotaryFields(fields, notes=(note,))
    return RotaryFields(fields)


def llama3_factors(rope: Rope) -> tuple[float, ...]:
    """Returns the number that each frequency of `llama3` scaling is divided by, highest frequency first."""
    low, high = rope.scaling["low_freq_factor"], rope.scaling["high_freq_factor"]
    original, factor = rope.scaling["original_max_position_embeddings"], rope.scaling["factor"]
    found = []
    for pair in range(0, rope.rotary_dim, 2):
        turns = original / (2 * math.pi * rope.theta ** (pair / rope.rotary_dim))
        if turns > high:
            found.append(1.0)
        elif turns < low:
            found.append(float(factor))
        else:
            smooth = (turns - low) / (high - low)
            found.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return tuple(found)


def _scaling(kind: str, factor: float) -> dict[str, FieldValue]:
    return {"{arch}.rope.scaling.type": kind, "{arch}.rope.scaling.factor": factor}


def _usual_factor(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _attention_factor(rope: Rope) -> float:
    """Returns the factor of cosines and sines that transformers computes for `yarn`."""
    given, factor = rope.scaling.get("attention_factor"), float(rope.scaling["factor"])
    if given is not None:
        return float(given)
    scales = rope.scaling.get("mscale"), rope.scaling.get("mscale_all_dim")
    if all(scales):
        above, below = (_usual_factor(factor, float(each)) for each in scales if each is not None)
        return above / below
    return _usual_factor(factor)
