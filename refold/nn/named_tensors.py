"""Parameters under names with dots, held by one module."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn


class NamedTensors(nn.Module):
    """Holds parameters under names such as `q_proj.a`, with no module `q_proj` below it.

    Libraries that add adapters by name (PEFT) take every module whose name ends in `q_proj` for the linear. The tensors
    that a depth has for that linear must have that name as well, so they are parameters of one module. Code that
    looks a tensor up by its path (`get_submodule`, loaders, offloading) gets a view for each part of a name.

    Args:
        tensors: By name; a name has at most one dot.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Adds or replaces a parameter; torch's own method refuses dots."""
        self._parameters[name] = param

    def __getitem__(self, owner: str) -> "OwnerView":
        return OwnerView(self, owner)

    def __contains__(self, owner: str) -> bool:
        return any(name.startswith(f"{owner}.") for name in self._parameters)

    def __getattr__(self, name: str) -> Any:
        # While a copy is made there are no parameters yet.
        if name not in (held := self.__dict__.get("_parameters", {})) and any(
            each.startswith(f"{name}.") for each in held
        ):
            return self[name]
        return super().__getattr__(name)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        # torch reports keys with a dot as unexpected, because it finds no submodule of that name.
        own = {f"{prefix}{name}" for name in self._parameters}
        unexpected[:] = [name for name in unexpected if name not in own]

    def extra_repr(self) -> str:
        sizes = ((name, tuple(held.shape)) for name, held in self._parameters.items() if held is not None)
        return ", ".join(f"{name}={shape}" for name, shape in sizes)


class OwnerView(nn.Module):
    """The parameters of a `NamedTensors` for one owner, as a module that holds no parameters of its own.

    Args:
        tensors: Holds the parameters.
        owner: The part of the names before the dot.
    """

    def __init__(self, tensors: NamedTensors, owner: str):
        super().__init__()
        self._parameters = _Below(tensors._parameters, f"{owner}.")  # pyright: ignore[reportAttributeAccessIssue]


class _Below(MutableMapping[str, Any]):
    """The entries of a dictionary whose keys begin with a prefix, under keys without it."""

    def __init__(self, held: dict[str, Any], prefix: str):
        self._held, self._prefix = held, prefix

    def __getitem__(self, key: str) -> Any:
        return self._held[self._prefix + key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._held[self._prefix + key] = value

    def __delitem__(self, key: str) -> None:
        del self._held[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self._prefix) for key in list(self._held) if key.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
