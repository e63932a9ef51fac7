"""One module of refold as text: its imports, and its definitions with their places."""

import ast
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from refold.exporting.hub.global_names import (
    PACKAGE,
    Function,
    Import,
    Use,
    bound_names,
    global_names,
    is_static,
    is_text,
    own_folder,
)


@dataclass(frozen=True)
class Unit:
    """A statement of a module or of a class body, with the comments above it and the string that describes it below.

    Attributes:
        node: The statement.
        names: The names that the statement binds.
        start: Offset of its first byte.
        stop: Offset after its last byte, the end of the line included.
    """

    node: ast.stmt
    names: tuple[str, ...]
    start: int
    stop: int


class ModuleCode:
    """The source text of one module.

    Args:
        name: Full name of the module, such as `refold.nn.part`.
        source: Its text; None: that of its file.

    Attributes:
        source: The text, in UTF-8, because `ast` counts columns in bytes.
        tree: The parsed text.
    """

    def __init__(self, name: str, source: bytes | None = None):
        self.name = name
        *package, stem = name.split(".")
        self.source = source or (own_folder(".".join(package)) / f"{stem}.py").read_bytes()
        self.tree = ast.parse(self.source)
        lines = self.source.splitlines(keepends=True)
        self._lines = lines
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line))
        self.dropped: list[tuple[int, int]] = []
        """Places of the statements that `drop` removed from the tree."""

    def drop(self, is_dropped: Callable[[ast.stmt, Mapping[str, Import]], bool]) -> None:
        """Removes statements inside functions from the tree, and remembers their places.

        Args:
            is_dropped: Says, from a statement and the imports of the module, whether it is removed.
        """
        for node in ast.walk(self.tree):
            if isinstance(node, Function):
                body = [each for each in node.body if not is_dropped(each, self.imports)]
                self.dropped += [(self._begin(each), self.end(each)) for each in node.body if each not in body]
                assert body, f"{self.name}: nothing is left of {node.name}"
                node.body = body

    def drop_entries(self, table: str, kept: Collection[str]) -> None:
        """Removes the entries of a dictionary whose keys are not in `kept`, and remembers their places."""
        for node in self.tree.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == table:
                assert isinstance(node.value, ast.Dict)
                pairs = list(zip(node.value.keys, node.value.values, strict=True))
                for key, value in pairs:
                    assert isinstance(key, ast.Constant)
                    assert key.lineno == value.end_lineno
                    if key.value not in kept:
                        self.dropped.append((self._starts[key.lineno - 1], self._starts[key.lineno]))
                left = [(key, value) for key, value in pairs if isinstance(key, ast.Constant) and key.value in kept]
                node.value.keys, node.value.values = [key for key, _ in left], [value for _, value in left]

    @cached_property
    def imports(self) -> dict[str, Import]:
        """The imports of the module by the name they bind; of refold's modules those inside functions too."""
        found: dict[str, Import] = {}
        static = {id(node) for each in self.tree.body if is_static(each) for node in ast.walk(each)}
        top = set(map(id, self.tree.body))
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                for alias in node.names:
                    each = Import(node.module, alias.name)
                    if id(node) in top or (each.is_own and id(node) not in static):
                        found[alias.asname or alias.name] = each
            elif isinstance(node, ast.Import) and id(node) in top:
                for alias in node.names:
                    assert alias.asname is None or "." not in alias.name, f"{self.name}: import {alias.name}"
                    found[alias.asname or alias.name.partition(".")[0]] = Import(alias.name)
        return found

    def needs(self) -> list[str]:
        """Returns the modules of refold that this module imports when it is imported, in order."""
        found: dict[str, None] = {}
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
                for alias in node.names:
                    origin = Import(node.module or "", alias.name)
                    found[origin.as_module() or origin.module] = None
        return [
            name for name in found if (own_folder(name.rpartition(".")[0]) / f"{name.rpartition('.')[2]}.py").exists()
        ]

    @cached_property
    def units(self) -> list[Unit]:
        """The statements of the module, without imports and its docstring."""
        return [each for each in self.cut(self.tree.body) if not isinstance(each.node, (ast.Import, ast.ImportFrom))]

    @cached_property
    def definitions(self) -> dict[str, Unit]:
        """The statements of the module by the names they bind."""
        return {name: unit for unit in self.units for name in unit.names}

    def cut(self, body: list[ast.stmt]) -> list[Unit]:
        """Returns the statements of a module, or of a class body, without docstrings of the module or class."""
        found: list[Unit] = []
        for node in body:
            if is_text(node):
                if found:
                    found[-1] = Unit(found[-1].node, found[-1].names, found[-1].start, self.end(node))
                continue
            branch = node.body[0] if isinstance(node, ast.If) and is_static(node) else node
            found.append(Unit(branch, bound_names(branch), self._begin(branch), self.end(branch)))
        return found

    def text(self, node: ast.AST) -> str:
        """Returns the source text of an expression."""
        start, stop = self.place(node)
        return self.source[start:stop].decode()

    def place(self, node: ast.AST) -> tuple[int, int]:
        """Returns the offsets of a node's first byte and of the byte after it."""
        at = node.lineno, node.col_offset, node.end_lineno, node.end_col_offset  # pyright: ignore[reportAttributeAccessIssue]
        return self._starts[at[0] - 1] + at[1], self._starts[at[2] - 1] + at[3]

    def _begin(self, node: ast.stmt) -> int:
        """Returns the offset of a statement's first line: that of its decorators, or of comments right above."""
        decorators = getattr(node, "decorator_list", [])
        line = min([node.lineno, *(each.lineno for each in decorators)])
        while line > 1 and self._lines[line - 2].strip().startswith(b"#"):
            line -= 1
        return self._starts[line - 1]

    def end(self, node: ast.stmt) -> int:
        """Returns the offset after the last line of a statement."""
        assert node.end_lineno is not None
        return self._starts[node.end_lineno]

    def uses(self, node: ast.AST, inside: ast.ClassDef | None = None) -> list[Use]:
        """Returns the global names that a statement uses, annotations and quoted types included.

        Args:
            node: A statement.
            inside: The class whose body it stands in.
        """
        return global_names(node, self.imports, inside)
