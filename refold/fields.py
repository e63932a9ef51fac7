"""The base class of recipe sections, and the types of their number fields (`20M`, `1.5k`, `5e-4`)."""

import ast
import inspect
import re
import sys
from decimal import Decimal
from functools import cache
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from refold.suggest import MAX_NUMBER, shorten


class Section(BaseModel):
    """Base class of all recipe sections: immutable, without unknown keys; `describe_fields` reads its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def describe_fields(model: type[BaseModel]) -> dict[str, str]:
    """Returns the docstrings below the fields of a class and of its bases, by name of the field.

    They are read from the source when they are needed. pydantic's `use_attribute_docstrings` reads them while classes
    are made, and looks through all loaded modules for each frame of the stack, which takes seconds after torch.
    """
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        if issubclass(each, BaseModel) and each is not BaseModel:
            found |= _docstrings(each.__module__).get(each.__qualname__, {})
    return {name: found[name] for name in model.model_fields if name in found}


@cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """Returns the docstrings below annotated names of the classes of a module, by class."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: dict(_below(node)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _below(node: ast.ClassDef) -> list[tuple[str, str]]:
    return [
        (field.target.id, inspect.cleandoc(text.value.value))
        for field, text in pairwise(node.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    ]


SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_WRITTEN = re.compile(
    r"(?P<number>\d[\d_]{0,30}(\.\d{1,30})?(e\+?\d{1,2})?)\s*(?P<suffix>[kmbgt]?)", re.IGNORECASE | re.ASCII
)


def read_amount(value: Any) -> Any:
    """Reads a count with an optional suffix: `20M` is 20,000,000. Returns other types unchanged for the field to check.

    Raises:
        ValueError: A string is not a whole number.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    match = _WRITTEN.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"must be a whole number such as 20000000, 20M or 1.5k (got {shorten(value)})")
    amount = Decimal(match["number"].replace("_", "")) * SUFFIXES[match["suffix"].lower()]
    if amount > MAX_NUMBER:
        raise ValueError(f"must be at most {MAX_NUMBER} (got {shorten(value)})")
    if amount != int(amount):
        raise ValueError(f"must be a whole number (got {value!r}, which is {amount})")
    return int(amount)


def refuse_repeats(values: tuple) -> tuple:
    """Checks that no entry of a list occurs twice, and returns the list.

    Raises:
        ValueError: An entry occurs twice.
    """
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"each entry must occur once (got {shorten(value)} {values.count(value)} times)")
    return values


def _refuse_booleans(value: Any) -> Any:
    # pydantic would convert `true` to 1.0. Strings are allowed, because YAML reads 5e-4 as a string.
    if isinstance(value, bool):
        raise ValueError(f"must be a number (got {str(value).lower()})")
    return value


Count = Annotated[int, Field(strict=True, ge=1, le=MAX_NUMBER)]
LayerIndex = Annotated[int, Field(strict=True, ge=0, le=MAX_NUMBER)]
Amount = Annotated[int, BeforeValidator(read_amount), Field(strict=True, ge=1, le=MAX_NUMBER)]
Real = Annotated[float, BeforeValidator(_refuse_booleans), Field(allow_inf_nan=False)]
