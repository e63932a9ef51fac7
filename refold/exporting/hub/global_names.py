"""The global names that code uses: names that no function, class or comprehension around them binds."""

import ast
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

PACKAGE = "refold"
Function = ast.FunctionDef | ast.AsyncFunctionDef
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Import(NamedTuple):
    """The origin of an imported name.

    Attributes:
        module: The module, such as `torch.nn`.
        name: The name in the module; None: the module itself.
    """

    module: str
    name: str | None = None

    @property
    def is_own(self) -> bool:
        """Whether it comes from refold."""
        return self.module.partition(".")[0] == PACKAGE

    def as_module(self) -> str | None:
        """Returns the module of refold that the name stands for; None: it stands for something else."""
        if not self.is_own or self.name is None:
            return None
        full = f"{self.module}.{self.name}"
        return full if (own_folder(self.module) / f"{self.name}.py").exists() else None


class Use(NamedTuple):
    """A global name in code.

    Attributes:
        name: The name as it is spelled there.
        node: The name; the string in which it stands; or the attribute of a module.
        attribute: The attribute, where the name stands for a module of refold.
        is_annotation: Whether the name stands in an annotation.
    """

    name: str
    node: ast.expr
    attribute: str | None = None
    is_annotation: bool = False


def own_folder(package: str) -> Path:
    """Returns the folder of a package of refold."""
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]).joinpath(*package.split(".")[1:])


def global_names(node: ast.AST, imports: Mapping[str, Import], inside: ast.ClassDef | None = None) -> list[Use]:
    """Returns the global names that a statement uses, annotations and quoted types included.

    Args:
        node: A statement.
        imports: The imports of its module.
        inside: The class whose body it stands in.
    """
    return _Uses(imports, node, inside).found


class _Uses(ast.NodeVisitor):
    """Collects global names, with a stack of the names that the scopes around a node bind."""

    def __init__(self, imports: Mapping[str, Import], node: ast.AST, inside: ast.ClassDef | None):
        self.imports = imports
        self.found: list[Use] = []
        self.is_annotation = False
        self.scopes: list[tuple[bool, set[str]]] = []
        if inside is not None and not isinstance(node, SCOPES):
            self.scopes.append((True, {name for each in inside.body for name in bound_names(each)}))
        self.visit(node)

    def _is_local(self, name: str) -> bool:
        last = len(self.scopes) - 1
        return any(
            name in names for place, (is_class, names) in enumerate(self.scopes) if place == last or not is_class
        )

    def visit_Name(self, node: ast.Name) -> None:
        if not self._is_local(node.id):
            self.found.append(Use(node.id, node, None, self.is_annotation))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        base = node.value
        if isinstance(base, ast.Name) and not self._is_local(base.id):
            origin = self.imports.get(base.id)
            if origin is not None and origin.as_module() is not None:
                self.found.append(Use(base.id, node, node.attr, self.is_annotation))
                return
        self.generic_visit(node)

    def _visit_function(self, node: Function) -> None:
        for each in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(each)
        arguments = node.args
        for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
            if each is not None and each.annotation is not None:
                self._visit_annotation(each.annotation)
        if node.returns is not None:
            self._visit_annotation(node.returns)
        self.scopes.append((False, _local_names(node)))
        for each in node.body:
            self.visit(each)
        self.scopes.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = _visit_function

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for each in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(each)
        self.scopes.append((False, _parameters(node.args)))
        self.visit(node.body)
        self.scopes.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for each in (*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords)):
            self.visit(each)
        self.scopes.append((True, {name for each in node.body for name in bound_names(each)}))
        for each in node.body:
            self.visit(each)
        self.scopes.pop()

    def visit_Subscript(self, node: ast.Subscript) -> None:
        # The checks of `Annotated[type, check, ...]` are not for the generated file.
        self.visit(node.slice.elts[0] if (is_checked := is_annotated(node)) else node.value)  # pyright: ignore
        if not is_checked:
            self.visit(node.slice)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit(node.target)
        self._visit_annotation(node.annotation)
        if node.value is not None:
            self.visit(node.value)

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, LOOPS):
            targets = [each.target for each in node.generators]
            names = {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
            self.scopes.append((False, names))
            super().generic_visit(node)
            self.scopes.pop()
        else:
            super().generic_visit(node)

    def _visit_annotation(self, node: ast.expr) -> None:
        self.is_annotation = True
        self.visit(node)
        self.is_annotation = False
        for each in ast.walk(node):
            if isinstance(each, ast.Constant) and isinstance(each.value, str):
                try:
                    quoted = ast.parse(each.value, mode="eval")
                except SyntaxError:
                    continue  # A shape, such as "B T D".
                self.found += [
                    Use(name.id, each, None, True) for name in ast.walk(quoted) if isinstance(name, ast.Name)
                ]


def is_annotated(node: ast.AST) -> bool:
    """Says whether an expression is a type with checks: `Annotated[type, check, ...]`."""
    return isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Annotated"


def is_text(node: ast.stmt) -> bool:
    """Says whether a statement is a text, such as a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def is_static(node: ast.stmt) -> bool:
    """Says whether a statement is the branch of type checkers, which is taken instead of the other branch."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _parameters(arguments: ast.arguments) -> set[str]:
    named = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
    return {each.arg for each in named if each is not None}


def _local_names(function: Function) -> set[str]:
    """Returns the names that a function binds, its parameters included; imports from refold count as global."""
    found, outside = _parameters(function.args), set[str]()
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Global):
            outside |= set(node.names)
        if isinstance(node, LOOPS):
            # Targets belong to the comprehension; a name bound by `:=` belongs to the function.
            found |= {each.target.id for each in ast.walk(node) if isinstance(each, ast.NamedExpr)}
            continue
        if isinstance(node, ast.stmt) and not isinstance(node, (ast.For, ast.If, ast.With)):
            found |= set(bound_names(node))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
            found.add(node.id)
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            found.add(node.name)
        if not isinstance(node, SCOPES):
            pending += ast.iter_child_nodes(node)
    return found - outside


def bound_names(node: ast.stmt) -> tuple[str, ...]:
    """Returns the names that a statement binds where it stands; imports from refold bind none."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return (node.name,)
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        module = getattr(node, "module", None) or ""
        if module.partition(".")[0] == PACKAGE:
            return ()
        return tuple(each.asname or each.name.partition(".")[0] for each in node.names)
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [each for target in targets for each in ast.walk(target)]
        return tuple(each.id for each in names if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store))
    if isinstance(node, (ast.For, ast.If, ast.With)):
        return tuple(
            each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
        )
    return ()
