"""The adapters that requests of one engine may ask for, besides the model's own."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path

from refold.checkpoint.locate import Source
from refold.engine.exits import ExitLevels
from refold.errors import RefoldError
from refold.modeling.adapters import AdapterBase, AdapterSet
from refold.modeling.model import RefoldForCausalLM
from refold.modeling.packed_weights import PackedBytes
from refold.suggest import must_be_one_of


class NamedAdapters:
    """Sets of adapters by name.

    Args:
        model: As it is opened, before it is packed.
        is_folder: Whether it was loaded from its folder for the engine.
        is_packed_next: Whether it will be packed.
    """

    def __init__(self, model: RefoldForCausalLM, is_folder: bool, is_packed_next: bool):
        folder = Path(str(model.config._name_or_path)) if is_folder else None
        self._base = AdapterBase(model, folder, is_packed_next)
        self._sets: dict[str, AdapterSet] = {}
        self._exits: dict[int, ExitLevels | None] = {}
        self._numbers = count(1)

    @property
    def names(self) -> tuple[str, ...]:
        """Names, in the order in which they were added."""
        return tuple(self._sets)

    @property
    def num_bytes(self) -> int:
        """Bytes of all sets."""
        return sum(each.num_bytes for each in self._sets.values())

    def describe(self) -> str:
        """Returns a part of a line about weights; empty if there are no further adapters."""
        if not self._sets:
            return ""
        return f" ({len(self._sets)} further adapters: {self.num_bytes / 1e6:,.1f} MB)"

    def make(
        self, model: RefoldForCausalLM, packed: PackedBytes | None, name: str, source: str | Path | Source
    ) -> AdapterSet:
        """Returns the adapters of a folder, which `add` makes known.

        Args:
            model: As the engine runs it.
            packed: Its bytes and formats; None: it is not packed.
            name: By which requests choose them.
            source: Folder or hub id.

        Raises:
            RefoldError: The name is empty or taken, or the model has no adapters.
            FolderError: The folder's adapters do not fit.
        """
        if not name.strip() or not name.isprintable():
            raise RefoldError(f"adapter: a name of printable characters is required (got {name!r})")
        if name in self._sets:
            raise RefoldError(f"adapter: a name that is not taken is required (got {name!r} twice)")
        return self._base.make(model, packed, source, name, next(self._numbers))

    def add(self, made: AdapterSet, exits: ExitLevels | None) -> None:
        """Lets requests ask for adapters, whose tokens leave by these rules; None: there are no exits."""
        self._sets[made.name], self._exits[made.number] = made, exits

    def exits(self, adapters: AdapterSet) -> ExitLevels | None:
        """Returns the rules by which tokens of requests with some adapters leave."""
        return self._exits[adapters.number]

    def find(self, name: str | None) -> AdapterSet | None:
        """Returns a set by its name; None, the model's own, for None.

        Raises:
            RefoldError: There is no such set.
        """
        if name is None:
            return None
        if not self._sets:
            raise RefoldError(
                f"adapter: an engine with further adapters is required (got {name!r}); add_adapters adds some"
            )
        if name not in self._sets:
            raise RefoldError(f"adapter: {must_be_one_of(name, self._sets)}")
        return self._sets[name]


def one_for_each(adapter: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    """Returns the adapters of each prompt of a call.

    Raises:
        RefoldError: Not as many names as prompts.
    """
    if adapter is None or isinstance(adapter, str):
        return [adapter] * count
    if len(adapter) != count:
        raise RefoldError(f"adapter: one for each of the {count} prompts is required (got {len(adapter)})")
    return list(adapter)
