"""Recipes as YAML text: syntax errors with their line, duplicate keys refused."""

from collections.abc import Hashable
from typing import Any

import yaml

from refold.errors import RecipeError


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' stands twice (first in line {seen[key]})", key_node.start_mark
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """Parses YAML with plain data only.

    Args:
        text: The YAML.
        where: What messages call it.

    Raises:
        RecipeError: Not YAML, or a key stands twice; the line is named.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{where}{line}: valid YAML is required ({error.problem or error.context})") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: valid YAML is required ({' '.join(str(error).split())[:120]})") from None
