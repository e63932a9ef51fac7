"""Stand-ins of the generated file for pydantic's models and jaxtyping's annotations, which it does not require."""

import dataclasses
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from refold.errors import RecipeError


class ShapedTensor:
    """`Float[Tensor, "B T D"]` states dtype and shape of a tensor to the reader; nothing checks them."""

    def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
        return item[0]


class PlainData:
    """Base class of immutable objects that are read from plain data, such as the blueprint in `config.json`.

    Every subclass is a frozen dataclass. The model was checked when it was exported, so that types alone are checked
    here. A class whose field `type` has no default stands for the subclass whose default equals the value.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    @classmethod
    def model_validate(cls, data: Any, where: str = "config.json: blueprint") -> Any:
        """Reads an object from a mapping of its fields.

        Raises:
            RecipeError: A field is missing, unknown or of another type.
        """
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise RecipeError(f"{where}: a mapping is required (got {data!r}); take an undamaged copy of the folder")
        chosen = cls._choose(data.get("type"), where)
        fields = {field.name: field for field in dataclasses.fields(chosen)}  # pyright: ignore[reportArgumentType]
        unknown = sorted(str(name) for name in data.keys() - fields.keys())
        missing = sorted(name for name in fields.keys() - data.keys() if _is_required(fields[name]))
        if unknown or missing:
            raise RecipeError(
                f"{where}: exactly the fields of {chosen.__name__} are required (unknown: {unknown or 'none'}, "
                f"missing: {missing or 'none'}); take an undamaged copy of the folder"
            )
        return chosen(**{name: _read(fields[name].type, data[name], f"{where}.{name}") for name in data})

    @classmethod
    def _choose(cls, kind: Any, where: str) -> Any:
        field = getattr(cls, "__dataclass_fields__", {}).get("type")
        if field is None or not _is_required(field):
            return cls
        found: list[Any] = [each for each in _below(cls) if getattr(each, "type", None) == kind]
        if not found:
            raise RecipeError(
                f"{where}.type: the type of a {cls.__name__} is required (got {kind!r}); check the folder"
            )
        return found[0]

    def model_copy(self, update: Mapping[str, Any]) -> Any:
        """Returns a copy with other values of some fields."""
        return dataclasses.replace(self, **update)  # pyright: ignore[reportArgumentType]

    def model_dump(self, mode: str = "json") -> dict[str, Any]:
        """Returns the fields as plain data."""
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        return {field.name: _plain(getattr(self, field.name)) for field in fields}


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _below(kind: type) -> list[type]:
    return [found for each in kind.__subclasses__() for found in (each, *_below(each))]


def _plain(value: Any) -> Any:
    if isinstance(value, PlainData):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _read(hint: Any, value: Any, where: str) -> Any:
    """Reads a value of a type: a class of plain data, a number, a text, a tuple or dictionary of those, or a union."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        return _read(next(each for each in arguments if each is not NoneType), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_read(arguments[0], each, f"{where}[{index}]") for index, each in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {name: _read(arguments[1], each, f"{where}.{name}") for name, each in value.items()}
    if origin is Literal and value in arguments:
        return value
    if isinstance(hint, type) and origin is None:
        if issubclass(hint, PlainData):
            return hint.model_validate(value, where)
        if hint is float and type(value) is int:
            return float(value)
        if type(value) is hint:
            return value
    name = hint.__name__ if origin is None and isinstance(hint, type) else str(hint)
    raise RecipeError(f"{where}: {name} is required (got {value!r}); take an undamaged copy of the folder")
