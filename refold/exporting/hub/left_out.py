"""The parts of refold that the generated file leaves out or replaces."""

import ast
from collections.abc import Mapping

from refold.exporting.hub.global_names import Import

MODULES = {
    "refold.modeling.registration": "the Auto classes find the generated file by `auto_map`",
    "refold.nn.workshop": "packing is for refold's engine",
    "refold.nn.weights": "packing is for refold's engine",
    "refold.nn.packed": "packing is for refold's engine",
    "refold.nn.joined": "packing is for refold's engine",
}
"""Modules that are left out, with the reason. Annotations name `Any` in place of their classes."""
NAMES = {("refold.nn.norms", "FusedNorm"): "packing is for refold's engine"}
"""Definitions that are left out, by module and name, with the reason."""
MEMBERS = {"auto_map": "the value of the folder's config holds"}
"""Members of classes that are left out, with the reason."""
TABLE = ("refold.nn.mixers.registry", "MIXERS")
"""The table of mixers, which loses the mixers that a model does not have."""
UNSET = {"packed", "fused"}
"""Attributes that only packing sets: a branch that asks whether one of them is there is left out."""
_HERE = "refold.exporting.hub.stand_ins"
STAND_INS = {
    ("refold.families.arch", "Frozen"): (_HERE, "PlainData"),
    ("refold.fields", "Section"): (_HERE, "PlainData"),
}
"""Definitions that others replace, by module and name."""
SHAPES = (_HERE, "ShapedTensor")
"""The definition that replaces jaxtyping's types."""


def is_left_out(place: tuple[str, str]) -> bool:
    """Says whether a definition, given by module and name, is left out."""
    return place[0] in MODULES or place in NAMES


def is_dropped(node: ast.stmt, imports: Mapping[str, Import]) -> bool:
    """Says whether a statement is dropped: a branch for packed parts, or a call of a function that is left out."""
    if isinstance(node, ast.If) and not node.orelse:
        tests = node.test.values if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And) else []
        return any(_asks_whether_packed(each) for each in (node.test, *tests))
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
        origin = imports.get(node.value.func.id)
        return origin is not None and is_left_out((origin.module, origin.name or ""))
    return False


def _asks_whether_packed(test: ast.expr) -> bool:
    return (
        isinstance(test, ast.Compare)
        and isinstance(test.left, ast.Attribute)
        and test.left.attr in UNSET
        and isinstance(test.ops[0], ast.IsNot)
    )
