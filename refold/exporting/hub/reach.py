"""The definitions, and the members of their classes, that a set of classes of refold needs to run."""

import ast
import importlib
import re
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

from refold.exporting.hub.global_names import PACKAGE, Function, Use
from refold.exporting.hub.left_out import MEMBERS, STAND_INS, TABLE, is_dropped, is_left_out
from refold.exporting.hub.module_code import ModuleCode, Unit

Defined = tuple[str, str]
"""A module and the name of a definition in it."""
VALIDATORS = {"model_validator", "field_validator"}
"""Decorators of checks that an exported model has passed."""
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


class Reach:
    """Finds the definitions that some classes need.

    A definition is needed if needed code names it. A method, or another member of a class that holds no data, is needed
    if needed code names it as an attribute of anything or in a string, or if it replaces a member of a class of another
    library, which may call it.

    Args:
        roots: The classes to begin with.
        kinds: The mixers that the file shall have, by `type`.

    Attributes:
        members: The needed members of each needed class.
        namespaces: Modules that needed code passes on as values.
        qualified: Definitions that code names as attributes of their module, where a local name may be the same.
    """

    def __init__(self, roots: list[Defined], kinds: Collection[str]):
        self._kinds = kinds
        self._codes: dict[str, ModuleCode] = {}
        self._live: dict[Defined, Unit] = {}
        self._attributes: set[str] = set()
        self.members: dict[Defined, list[Unit]] = {}
        self.namespaces: set[str] = set()
        self.qualified: set[Defined] = set()
        self._pending = list(roots)
        while self._pending:
            while self._pending:
                self._take(self._pending.pop())
            self._take_members()

    def code(self, module: str) -> ModuleCode:
        """Returns the source text of a module of refold, without the statements that are left out."""
        if module not in self._codes:
            code = self._codes[module] = ModuleCode(module)
            code.drop(is_dropped)
            if module == TABLE[0]:
                code.drop_entries(TABLE[1], self._kinds)
        return self._codes[module]

    def resolve(self, module: str, use: Use) -> Defined | None:
        """Returns the definition that a name stands for, a stand-in in its place; None: none of refold's."""
        code = self.code(module)
        if use.name in code.definitions:
            return self._final((module, use.name))
        origin = code.imports.get(use.name)
        if origin is None or not origin.is_own:
            return None
        other = origin.as_module()
        if other is not None:
            return None if use.attribute is None else self._final((other, use.attribute))
        assert origin.name is not None
        return self._final((origin.module, origin.name))

    def namespace(self, module: str, use: Use) -> str | None:
        """Returns the module that a bare name stands for; None: it stands for something else."""
        origin = self.code(module).imports.get(use.name)
        return None if origin is None or use.attribute is not None else origin.as_module()

    def modules(self) -> list[str]:
        """Returns the modules that have needed definitions, each after those that it imports."""
        found: dict[str, None] = {}

        def visit(name: str, above: tuple[str, ...] = ()) -> None:
            if name in found or name in above:
                return
            for other in self.code(name).needs():
                visit(other, (*above, name))
            found[name] = None

        for module in sorted({module for module, _ in self._live}):
            visit(module)
        # A stand-in comes before everything that it may be the base of.
        first = sorted({module for module, _ in STAND_INS.values()})
        needed = {module for module, _ in self._live}
        needs = [each for name in first for each in self.code(name).needs()]
        return [name for name in dict.fromkeys((*needs, *first, *found)) if name in needed]

    def units(self, module: str) -> list[Unit]:
        """Returns the needed statements of a module in their order."""
        wanted = {id(unit.node) for (where, _), unit in self._live.items() if where == module}
        return [unit for unit in self.code(module).units if id(unit.node) in wanted]

    def _final(self, place: Defined) -> Defined:
        # A name that a module has imported itself stands for the definition in the other module.
        module, name = place
        if place not in STAND_INS and name not in self.code(module).definitions:
            origin = self.code(module).imports.get(name)
            if origin is not None and origin.is_own and origin.name is not None:
                return self._final((origin.module, origin.name))
        return STAND_INS.get(place, place)

    def _take(self, place: Defined) -> None:
        if place in self._live or is_left_out(place):
            return
        module, name = place
        unit = self.code(module).definitions.get(name)
        assert unit is not None, f"{module} has no {name}"
        for each in unit.names:
            self._live[module, each] = unit
        if isinstance(unit.node, ast.ClassDef):
            self.members[place] = []
            for each in (*unit.node.decorator_list, *unit.node.bases):
                self._read(module, each)
        else:
            self._read(module, unit.node)

    def _take_members(self) -> None:
        for (module, name), taken in self.members.items():
            node = self._live[module, name].node
            assert isinstance(node, ast.ClassDef)
            for unit in self.code(module).cut(node.body):
                if all(unit.node is not each.node for each in taken) and self._is_needed(module, name, unit):
                    taken.append(unit)
                    self._read(module, unit.node, node)
        for module in self.namespaces:
            for name in self.code(module).definitions:
                if name in self._attributes:
                    self._pending.append((module, name))
        self._pending = [place for place in self._pending if place not in self._live and not is_left_out(place)]

    def _is_needed(self, module: str, name: str, unit: Unit) -> bool:
        if any(_name_of(each) in VALIDATORS for each in getattr(unit.node, "decorator_list", [])):
            return False
        if MEMBERS.keys() & set(unit.names) or self._takes_left_out(module, unit):
            return False
        if self._attributes & set(unit.names) or any(each.startswith("__") for each in unit.names):
            return True
        found = getattr(importlib.import_module(module), name)
        if _holds_data(found) and _is_field(unit.node) and "model_config" not in unit.names:
            return True
        return any(each in vars(base) for base in found.__mro__ if not _is_own(base) for each in unit.names)

    def _takes_left_out(self, module: str, unit: Unit) -> bool:
        """Says whether a method has a parameter of a class that is left out, so that nothing can call it."""
        if not isinstance(unit.node, Function):
            return False
        for each in (*unit.node.args.args, *unit.node.args.kwonlyargs):
            uses = [] if each.annotation is None else self.code(module).uses(each.annotation)
            places = (self.resolve(module, use) for use in uses)
            if any(place is not None and is_left_out(place) for place in places):
                return True
        return False

    def _read(self, module: str, node: ast.AST, inside: ast.ClassDef | None = None) -> None:
        for use in self.code(module).uses(node, inside):
            place = self.resolve(module, use)
            if place is not None:
                self._pending.append(place)
                self.qualified |= {place} if use.attribute is not None else set()
            elif (other := self.namespace(module, use)) is not None:
                self.namespaces.add(other)
        self._attributes |= set(_attributes(node))


def _attributes(node: ast.AST) -> Iterator[str]:
    """Yields the names of attributes that code reads, those in strings for `getattr` included."""
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute):
            yield each.attr
        elif isinstance(each, ast.Constant) and isinstance(each.value, str) and _IDENTIFIER.fullmatch(each.value):
            yield each.value


def _holds_data(found: Any) -> bool:
    """Says whether a class is a dataclass, a named tuple or a model of pydantic, whose fields all belong to it."""
    names = {base.__name__ for base in found.__mro__}
    return hasattr(found, "__dataclass_fields__") or hasattr(found, "_fields") or "BaseModel" in names


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and ClassVar.__name__ not in ast.dump(node.annotation)


def _is_own(found: type) -> bool:
    return found.__module__.partition(".")[0] == PACKAGE


def _name_of(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
