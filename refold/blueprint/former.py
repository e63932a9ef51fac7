"""Reads blueprints as earlier versions wrote them, and the tensor names of their folders."""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from refold.mixers.registry import MIXERS
from refold.mixers.spec import MixerSpec

if TYPE_CHECKING:
    from refold.blueprint.schema import Blueprint


def read_part(value: Any) -> Any:
    """Returns a stored mixer with `mixer: {type, ...}`, given one with `type` and `options` beside each other."""
    if not isinstance(value, Mapping) or not value.keys() & {"type", "options"}:
        return value
    part = dict(value)
    options = part.pop("options", {})
    kind = part.pop("type", "attention")
    part["mixer"] = {**options, "type": kind} if isinstance(options, Mapping) else options
    return _with_current(part, ("factors", "bases"), kind)


def read_stack(value: Any) -> Any:
    """Returns a blueprint whose depths name their linears as in this version.

    A rank belongs to a linear of the depth's mixer or MLP, so only the stack tells which mixer's names it has.
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
    """Returns the tensor names of earlier versions, as regular expressions, and their replacements.

    A mixer renames only its own tensors, whose names no other version of it has: names of this version match nothing.
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
    """Returns the tensors of a folder, by their names in this version, with their names in the folder."""
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
