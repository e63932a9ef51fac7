"""Healing protocols: lists of stages that share one token budget."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from refold.blueprint.numbers import read_amount
from refold.blueprint.recipe_yaml import parse_yaml
from refold.suggest import must_be_one_of


@cache
def _built_in() -> dict[str, dict[str, Any]]:
    found = {
        path.name.removesuffix(".yaml"): parse_yaml(path.read_text(encoding="utf-8"), path.name)
        for path in files("refold.protocols").iterdir()
        if path.name.endswith(".yaml")
    }
    return dict(sorted(found.items()))


def built_in_protocols() -> dict[str, str]:
    """Returns the built-in protocols, name to one-line description."""
    return {name: protocol["description"] for name, protocol in _built_in().items()}


def expand_protocol(name: str, tokens: int, changes: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Returns a protocol's stages as a recipe would list them.

    Args:
        name: One of `built_in_protocols()`.
        tokens: Budget of all stages together; each gets its share, at least one token.
        changes: Keys that replace those of every stage.

    Raises:
        ValueError: There is no such protocol, or the changes hold `tokens` of a stage.
    """
    known = _built_in()
    if name not in known:
        raise ValueError(f"protocol {must_be_one_of(name, known)}")
    expanded = []
    for stage in known[name]["stages"]:
        share = stage["share"]
        rest = {key: value for key, value in stage.items() if key != "share"}
        expanded.append({**rest, "tokens": max(1, round(share * tokens)), **(changes or {})})
    return expanded


def read_heal(value: Any) -> Any:
    """Reads a recipe's `heal` section: a list of stages, or `{protocol: NAME, tokens: N}` and keys for every stage.

    Raises:
        ValueError: The protocol is unknown, or the budget is missing or no number.
    """
    if not isinstance(value, Mapping):
        return value
    changes = dict(value)
    name, tokens = changes.pop("protocol", None), read_amount(changes.pop("tokens", None))
    if name is None:
        raise ValueError(
            f"must be a list of stages, or a mapping with `protocol` (got keys {', '.join(map(str, value))})"
        )
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"protocol {name}: requires `tokens`, such as 20M (got {tokens!r})")
    return expand_protocol(name, tokens, changes)


def scale_stages(stages: Sequence[Any], tokens: int) -> list[Any]:
    """Returns stages that keep their shares of a new budget.

    Args:
        stages: `HealStage`s.
        tokens: What they train for together.
    """
    total = sum(stage.tokens for stage in stages)
    return [stage.model_copy(update={"tokens": max(1, round(stage.tokens * tokens / total))}) for stage in stages]
