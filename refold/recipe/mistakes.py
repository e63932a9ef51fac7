"""Error messages for recipes: one line for each mistake that pydantic reports."""

import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from refold.suggest import did_you_mean, shorten

_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "below"),
}
_DEEPEST = 3
"""Keys of a path at most, when a key is looked for elsewhere in the recipe."""
MAX_MISTAKES = 30
"""Maximum number of mistakes in one message."""
# For a union, pydantic reports only the branch chosen by the value's type. These words name the other branches.
_ALTERNATIVES = {"<full>": " or a whole number", "<name>": " or a list"}
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "bool": "true or false",
    "dict": "a mapping",
    "model": "a mapping",
}


def describe_mistakes(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Returns a line `key.path: requirement (got value)` for every mistake, in the order of the recipe.

    Args:
        error: The error that pydantic raised.
        model: The validated model, which defines the legal keys.
    """
    found = [item for item in error.errors(include_url=False) if not _has_only_wrong_entries(item)]
    lines = [f"{_path(item)}: {_explain(item, model)}" for item in found[:MAX_MISTAKES]]
    return [*lines, f"... and {len(found) - MAX_MISTAKES} more"] if len(found) > MAX_MISTAKES else lines


def _has_only_wrong_entries(item: ErrorDetails) -> bool:
    """Tells whether a list is called too short because each of its entries is wrong; they have lines of their own."""
    return item["type"] == "too_short" and bool(item["input"])


def _location(item: ErrorDetails) -> tuple[int | str, ...]:
    # The location also holds marks for union branches and for dict keys, which are not keys of the recipe.
    return tuple(key for key in item["loc"] if not (isinstance(key, str) and (key[:1] == "<" or key == "[key]")))


def _path(item: ErrorDetails) -> str:
    path = ""
    for key in _location(item):
        path += f"[{key}]" if isinstance(key, int) else f".{str(key)[:100]}"
    return path.lstrip(".") or "recipe"


def _explain(item: ErrorDetails, model: type[BaseModel]) -> str:
    kind, got, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        location = item["loc"]
        legal = sorted(
            {_key_of(found, name) for found in _models_at(model, location[:-1]) for name in found.model_fields}
        )
        got = str(location[-1])
        # A key without its section is the usual mistake in an override.
        hint = _elsewhere(model, got) if len(location) == 1 else ""
        hint = hint or did_you_mean(got, legal) or f"; must be one of {', '.join(legal)}"
        return f"unknown key{hint}"
    if kind == "missing":
        return "required (not there)"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        legal = re.findall(r"'([^']*)'", context["expected"])
        return f"must be {_one_of(legal)}{_alternative(item)} (got {shorten(got)}){_closest(got, legal)}"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"must be {words} {context[key]} (got {shorten(got)})"
    if kind in ("too_short", "string_too_short"):
        return f"must not be empty (got {shorten(got)})"
    if kind in ("too_long", "string_too_long"):
        counted = "characters" if kind == "string_too_long" else "entries"
        return f"must be at most {context['max_length']} {counted} (got {len(got)})"
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']} (got {shorten(got)})"
    required = _TYPES.get(kind.split("_")[0])
    if required is not None:
        lacks_blank = required == "a mapping" and isinstance(got, str) and ":" in got
        hint = "; write a blank after the colon" if lacks_blank else ""
        return f"must be {required}{_alternative(item)} (got {shorten(got)}){hint}"
    return f"{item['msg'].lower()} (got {shorten(got)})"


def _elsewhere(model: type[BaseModel], name: str) -> str:
    """Returns `; did you mean 'heal.context'?` for the places in the recipe that have the key; empty without any."""
    places = list(dict.fromkeys(_places(model, name, ())))
    return f"; did you mean {' or '.join(map(repr, places))}?" if places else ""


def _places(model: type[BaseModel], name: str, above: tuple[str, ...]) -> Iterator[str]:
    for field, info in model.model_fields.items():
        path = (*above, _key_of(model, field))
        if _key_of(model, field) == name:
            yield ".".join(path)
        elif len(path) < _DEEPEST:
            for inner in _models_in(info.annotation):
                yield from _places(inner, name, path)


def _key_of(model: type[BaseModel], name: str) -> str:
    return model.model_fields[name].alias or name


def _alternative(item: ErrorDetails) -> str:
    return _ALTERNATIVES.get(str(item["loc"][-1]), "") if item["loc"] else ""


def _closest(got: Any, legal: list[str]) -> str:
    return did_you_mean(got, legal) if isinstance(got, str) else ""


def _one_of(legal: list[str]) -> str:
    return legal[0] if len(legal) == 1 else f"one of {', '.join(legal)}"


def _models_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[type[BaseModel]]:
    found = [model]
    for key in location:
        if isinstance(key, str) and key[:1] == "<":
            # The tag of a branch equals the default of its field `type`.
            found = [each for each in found if _type_of(each) == key.strip("<>")] or found
        elif isinstance(key, str) and key != "[key]":
            fields = [each.model_fields[key] for each in found if key in each.model_fields]
            found = [inner for field in fields for inner in _models_in(field.annotation)]
    return found


def _type_of(model: type[BaseModel]) -> Any:
    return model.model_fields["type"].default if "type" in model.model_fields else None


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
