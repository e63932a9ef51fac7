"""Reads blueprints as earlier versions wrote them, and the tensor names of their folders."""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from refold.mixers.registry import MIXERS
from refold.mixers.spec import MixerSpec

if TYPE_CHECKING:
    from refold.blueprint.schema import Blueprint


def read_part(value: Any) -> Any:
    """Converts a stored mixer with the keys `type` and `options` into the present form `mixer: {type, ...}`."""
    if not isinstance(value, Mapping) or not value.keys() & {"type", "options"}:
        return value
    part = dict(value)
    options = part.pop("options", {})
    kind = part.pop("type", "attention")
    part["mixer"] = {**options, "type": kind} if isinstance(options, Mapping) else options
    return _with_current(part, ("factors", "bases"), kind)


def read_stack(value: Any) -> Any:
    """Renames the linears in the ranks of all depths to their present names.

    The present name depends on the mixer of the depth, so the whole stack is needed.
    """
    if not isinstance(value, Mapping):
        return value
    mixers, depths = value.get("mixers"), value.get("depths")
    if not isinstance(mixers, (list, tuple)) or not isinstance(depths, (list, tuple)):
        return value
    kinds = {index: part["type"] for index, part in enumerate(mixers) if isinstance(part, Mapping) and "type" in part}
    if not kinds:
        return value
    return {**value, "depths": [_read_depth(depth, kinds) for depth in depths]}


def former_patterns(blueprint: "Blueprint") -> dict[str, str]:
    """Returns regular expressions for the tensor names of earlier versions, with their replacements.

    Each mixer renames only its own tensors. The present names match no expression.
    """
    parts: dict[type[MixerSpec], list[str]] = {}
    for index, part in enumerate(blueprint.mixers):
        parts.setdefault(type(part.mixer), []).append(rf"mixers\.{index}")
    for index, depth in enumerate(blueprint.depths):
        if depth.mixer is not None:
            owned = rf"depths\.{index}\.(?:vectors\.mixer|lora|coefficients)"
            parts[type(blueprint.mixers[depth.mixer].mixer)].append(owned)
    return {
        rf"^(model\.(?:{'|'.join(owners)})\.){re.escape(former)}(?=\.|$)": rf"\1{current}"
        for mixer, owners in parts.items()
        for former, current in mixer.former_names.items()
    }


def current_names(blueprint: "Blueprint", names: Iterable[str]) -> dict[str, str]:
    """Returns a mapping of present tensor names to the names that a folder uses."""
    patterns, found = former_patterns(blueprint), {}
    for name in names:
        current = name
        for pattern, replacement in patterns.items():
            current = re.sub(pattern, replacement, current)
        found[current] = name
    return found


def _read_depth(depth: Any, kinds: Mapping[int, Any]) -> Any:
    if not isinstance(depth, Mapping) or depth.get("mixer") not in kinds:
        return depth
    return _with_current(dict(depth), ("ranks",), kinds[depth["mixer"]])


def _with_current(data: dict[str, Any], keys: tuple[str, ...], kind: Any) -> dict[str, Any]:
    mixer = MIXERS.get(kind) if isinstance(kind, str) else None
    if mixer is None:
        return data
    for key in keys:
        if isinstance(data.get(key), Mapping):
            data[key] = {mixer.current_name(name): rank for name, rank in data[key].items()}
    return data
