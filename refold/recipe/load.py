"""The strict reader of recipes: built-in names, YAML files and `--set` overrides, with all mistakes in one error."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from refold.errors import RecipeError
from refold.recipe.mistakes import describe_mistakes
from refold.recipe.recipe import Recipe
from refold.recipe.yaml import MAX_BYTES, MAX_DEPTH, parse_yaml
from refold.suggest import MAX_ECHO, did_you_mean, shorten

RecipeLike = str | Path | Mapping[str, Any] | Recipe | None
"""The accepted forms of a recipe: a built-in name, a YAML file, its parsed content, a Recipe, or None (empty)."""


@cache
def _built_in_files() -> dict[str, str]:
    folder = files("refold.recipes")
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.name.endswith(".yaml")}
    return {name.removesuffix(".yaml"): found[name] for name in sorted(found)}


def built_in_recipes() -> dict[str, str]:
    """Returns name and one-line description of each built-in recipe."""
    return {name: load_recipe(name).description for name in _built_in_files()}


def load_recipe(recipe: RecipeLike = None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, applies overrides, and validates the result.

    Args:
        recipe: Built-in name, path of a YAML file, mapping, Recipe, or None for the empty recipe.
        overrides: `key.path=value` strings; the value is YAML. A number in the path is an index into a list; without
            one a key is set in every entry of a list of mappings, such as `heal.learning_rate` in every stage.

    Raises:
        RecipeError: The recipe has mistakes; the message has one line with the key path for each.
    """
    where, data = _read(recipe)
    for override in overrides:
        data = _override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = describe_mistakes(error, Recipe)
        if len(lines) == 1:
            raise RecipeError(f"{where}: {lines[0]}") from None
        raise RecipeError("\n  ".join((f"{where}: {len(lines)} mistakes", *lines))) from None


def _read(recipe: RecipeLike) -> tuple[str, dict[str, Any]]:
    if recipe is None:
        return "recipe", {}
    if isinstance(recipe, Recipe):
        return "recipe", recipe.model_dump(exclude_unset=True)
    if isinstance(recipe, Mapping):
        return "recipe", dict(recipe)
    if isinstance(recipe, str) and recipe in _built_in_files():
        where, text = f"recipe {recipe}", _built_in_files()[recipe]
    else:
        where, text = f"recipe {recipe}", _read_file(recipe)
    data = parse_yaml(text, where)
    if data is None:
        return where, {}
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: a mapping of sections is required (got {_kind(data)})")
    return where, data


def _read_file(recipe: str | Path) -> str:
    path, shown = Path(recipe), str(recipe)[:MAX_ECHO]
    try:
        with path.open("rb") as file:
            # A bounded read, because the path may be a device without an end.
            return file.read(4 * MAX_BYTES + 1).decode("utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"recipe {shown}: UTF-8 text is required (got other bytes)") from None
    except OSError as error:
        if isinstance(recipe, str) and path.suffix not in (".yaml", ".yml") and len(path.parts) == 1:
            raise RecipeError(
                f"recipe: must be one of {', '.join(_built_in_files())} or the path of a YAML file "
                f"(got {shorten(recipe)}){did_you_mean(recipe, _built_in_files())}"
            ) from None
        raise RecipeError(
            f"recipe {shown}: a readable YAML file is required ({error.strerror}); check the path"
        ) from None
    except ValueError:
        # The path contains a zero byte.
        raise RecipeError(f"recipe {shorten(str(recipe))}: the path of a YAML file is required; check it") from None


def _override(data: Any, override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    shown = f"--set {override[:MAX_ECHO]}"
    if not equals or not all(keys):
        raise RecipeError(f"{shown}: `key.path=value` is required, such as fold.loops=3")
    if len(keys) > MAX_DEPTH:
        raise RecipeError(f"{shown}: the path must have at most {MAX_DEPTH} keys (got {len(keys):,})")
    return _replaced(data, keys, parse_yaml(text, shown), shown, ())


def _replaced(data: Any, keys: Sequence[str], value: Any, where: str, above: tuple[str, ...]) -> Any:
    if not keys:
        return value
    key, here = keys[0], ".".join(above)
    if isinstance(data, (list, tuple)):
        if data and not key.isdecimal() and all(isinstance(entry, Mapping) for entry in data):
            return [_replaced(entry, keys, value, where, (*above, str(index))) for index, entry in enumerate(data)]
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < len(data)):
            raise RecipeError(
                f"{where}: {here} is a list of {len(data)}; an index below that is required (got {shorten(key)})"
            )
        index = int(key)
        return [*data[:index], _replaced(data[index], keys[1:], value, where, (*above, key)), *data[index + 1 :]]
    if data is not None and not isinstance(data, Mapping):
        raise RecipeError(
            f"{where}: {here} must be a mapping to hold {shorten(key)} (got {shorten(data)}); set it as a whole"
        )
    if key.isdecimal() and key not in (data or {}):
        advice = f"drop the {shorten(key)} to set a key of all of it" if data else "set it as a whole"
        raise RecipeError(f"{where}: {here or 'the recipe'} has no numbered entries; {advice}")
    section = dict(data or {})
    section[key] = _replaced(section.get(key), keys[1:], value, where, (*above, key))
    return section


def _kind(value: Any) -> str:
    return {"str": "text", "list": "a list", "int": "a number", "float": "a number"}.get(
        type(value).__name__, type(value).__name__
    )
