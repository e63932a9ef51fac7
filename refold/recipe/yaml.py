"""The strict YAML parser of recipes: only plain data, bounded size, and errors with their line."""

import math
from typing import Any

import yaml

from refold.errors import RecipeError
from refold.suggest import MAX_NUMBER, shorten

MAX_BYTES = 1 << 20
"""Maximum characters of a recipe."""
MAX_DEPTH = 50
"""Maximum depth of nested lists and mappings."""
MAX_NODES = 20_000
"""Maximum number of values in a recipe. Values behind an alias count for every use of the alias."""
MAX_DIGITS = 40
"""Maximum characters of a number."""
_MERGE = "tag:yaml.org,2002:merge"
_NULL = "tag:yaml.org,2002:null"


class _Refused(yaml.MarkedYAMLError):
    """An error of our own rules, with the line."""

    def __init__(self, problem: str, node: yaml.Node):
        super().__init__(None, None, problem, node.start_mark)


class _StrictLoader(yaml.SafeLoader):
    """A YAML loader with limits on depth and number of values, without repeated keys and keys that are not text."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = self._num_nodes = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        mark, before = self.peek_event().start_mark, self._num_nodes
        if self._depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"must be at most {MAX_DEPTH} levels deep", problem_mark=mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not is_alias:
            self._num_nodes += 1
            self._sizes[id(node)] = self._num_nodes - before
        elif id(node) in self._sizes:
            self._num_nodes += self._sizes[id(node)]
        else:
            raise yaml.MarkedYAMLError(problem="an anchor must not hold an alias of itself", problem_mark=mark)
        if self._num_nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=f"must hold at most {MAX_NODES:,} values", problem_mark=mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        own: dict[tuple[str, str], tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[tuple[str, str], tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused("a key must be text (got a list or a mapping)", key)
            if key.tag == _MERGE:
                for base in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    # If several bases have a key, the first base wins. Each base is already merged itself.
                    merged = {**_entries(base), **merged}
                continue
            name = (key.tag, key.value)
            if name in own:
                first = own[name][0].start_mark.line + 1
                raise _Refused(f"key {shorten(key.value)} stands twice (first in line {first})", key)
            own[name] = (key, value)
            if ":" in key.value and key.style is None and value.tag == _NULL and not value.value:
                spaced = ": ".join(key.value.split(":", 1))
                raise _Refused(
                    f"a blank is required after the colon (got {shorten(key.value)}); write {shorten(spaced)}", key
                )
        node.value = list({**merged, **own}.values())
        return node

    def construct_plain_bool(self, node: yaml.ScalarNode) -> bool:
        """Reads true or false.

        Raises:
            yaml.MarkedYAMLError: The text is neither.
        """
        if self.construct_scalar(node).lower() not in self.bool_values:
            raise _Refused(f"true or false is required (got {shorten(node.value)})", node)
        return self.construct_yaml_bool(node)

    def construct_plain_str(self, node: yaml.ScalarNode) -> str:
        """Reads text.

        Raises:
            yaml.MarkedYAMLError: The text holds half of a surrogate pair, which cannot be encoded.
        """
        text = self.construct_scalar(node)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _Refused("Unicode text is required (got half a surrogate pair)", node) from None
        return text

    def construct_plain_int(self, node: yaml.ScalarNode) -> int:
        """Reads a whole number.

        Raises:
            yaml.MarkedYAMLError: The text is not a whole number, or has too many digits.
        """
        return self._number(node, self.construct_yaml_int, "a whole number")

    def construct_plain_float(self, node: yaml.ScalarNode) -> float:
        """Reads a number.

        Raises:
            yaml.MarkedYAMLError: The text is not a number, or has too many digits.
        """
        return self._number(node, self.construct_yaml_float, "a number")

    def _number(self, node: yaml.ScalarNode, construct: Any, required: str) -> Any:
        text = self.construct_scalar(node)
        if len(text) > MAX_DIGITS:
            raise _Refused(f"a number must have at most {MAX_DIGITS} digits (got {len(text):,})", node)
        try:
            number = construct(node)
        except (ValueError, IndexError, OverflowError):
            raise _Refused(f"{required} is required (got {shorten(text)})", node) from None
        if math.isfinite(number) and abs(number) > MAX_NUMBER and isinstance(number, int):
            raise _Refused(f"a whole number must be at most {MAX_NUMBER} (got {shorten(text)})", node)
        return number


def _entries(base: yaml.Node) -> dict[tuple[str, str], tuple[yaml.Node, yaml.Node]]:
    """Returns the entries of a mapping after `<<`, which is merged into another mapping."""
    if not isinstance(base, yaml.MappingNode):
        raise _Refused("a mapping, or a list of mappings, is required after `<<`", base)
    return {(key.tag, key.value): (key, value) for key, value in base.value}


_PLAIN = {
    "null": _StrictLoader.construct_yaml_null,
    "bool": _StrictLoader.construct_plain_bool,
    "int": _StrictLoader.construct_plain_int,
    "float": _StrictLoader.construct_plain_float,
    "str": _StrictLoader.construct_plain_str,
    "seq": _StrictLoader.construct_yaml_seq,
    "map": _StrictLoader.construct_yaml_map,
}
# Only the types of JSON: a recipe has no use for YAML's dates, sets, binaries and ordered lists.
_StrictLoader.yaml_constructors = {
    None: _StrictLoader.construct_undefined,
    **{f"tag:yaml.org,2002:{name}": construct for name, construct in _PLAIN.items()},
}
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in (*_PLAIN, "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str) -> Any:
    """Parses YAML text that holds only plain data; merge keys (`<<: *base`) are supported.

    Args:
        text: The YAML.
        where: Name of the text in messages.

    Raises:
        RecipeError: The text is not YAML, is too large or too deep, or has a repeated key or a key that is not text.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{where}: must be at most {MAX_BYTES:,} characters (got {len(text):,}); shorten it")
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        said = " ".join((error.problem or error.context or "").split())[:300]
        raise RecipeError(f"{where}{line}: valid YAML is required ({said}); mend it") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: valid YAML is required ({' '.join(str(error).split())[:120]}); mend it") from None
    except (ValueError, OverflowError):
        # Numbers that the scanner reads itself: an escape beyond Unicode, or a huge version in a %YAML directive.
        raise RecipeError(
            f"{where}: valid YAML is required (an escape or a directive is out of range); mend it"
        ) from None
