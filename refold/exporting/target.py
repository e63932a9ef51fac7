"""The export target: a plug point with one file and one registry entry for each target; torch-free."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from refold.blueprint.quantisation import holds_integers
from refold.blueprint.schema import Blueprint
from refold.checkpoint.headers import DTYPE_BYTES
from refold.errors import ExportError
from refold.suggest import must_be_one_of

if TYPE_CHECKING:
    import torch

    from refold.checkpoint.folder import AtomicFolder
    from refold.checkpoint.provenance import Stage
    from refold.exporting.opened import OpenedModel, TensorSource

DTYPES = ("float32", "bfloat16", "float16")
FLOATS = "float"
"""The value of `quantise` for floats, also where the model stores integers."""
Status = Literal["kept", "larger", "impossible"]
"""How a target holds one model. `kept`: exactly, in the bytes of the model. `larger`: exactly, but stored weights are
repeated or dropped parts take space. `impossible`: not at all."""


class Obstacle(NamedTuple):
    """A property of a model that a format cannot hold."""

    required: str
    """The requirement of the format, such as `attention at every depth`."""
    got: str
    """The property of the model, with the depth."""
    change: str
    """The change in the recipe that would mend it, such as `fold.uneven=drop`."""


@dataclass(frozen=True)
class Verdict:
    """How a target holds one model.

    Attributes:
        status: See `Status`.
        reasons: Sentences about repeated weights, lost parts, or obstacles.
        changes: Changes in the recipe with which the target would hold the model, or keep its size.
    """

    status: Status
    reasons: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


def impossible(obstacles: list[Obstacle]) -> Verdict:
    """Returns the verdict of a target that cannot hold a model."""
    changes = dict.fromkeys(each.change for each in obstacles if each.change)
    return Verdict("impossible", tuple(f"{each.required} ({each.got})" for each in obstacles), tuple(changes))


@dataclass(frozen=True)
class ExportOptions:
    """Numbers in which an export stores weights.

    Attributes:
        dtype: float32, bfloat16 or float16; None: the model's dtype.
        quantise: A name of the target's `quantisations`; None: weights stay floats, or integers (`keeps_integers`).
        keep: Format by the name of a group of tensors (`embeddings`, `head`), or by a pattern of tensor names, for
            tensors that are stored in another format than the rest.
        keeps_integers: Whether weights that the model stores as integers keep them where the target has their format;
            without `quantise` only.
    """

    dtype: str | None = None
    quantise: str | None = None
    keep: Mapping[str, str] = field(default_factory=dict)
    keeps_integers: bool = False

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one number of the dtype, which must be set."""
        assert self.dtype is not None
        return DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ExportJob:
    """A model that is open for reading, and the folder to write.

    Attributes:
        name: Short name of the model: the hub id, or the name of its folder or file.
        blueprint: The model's blueprint; that of a source is the identity.
        config: The raw content of its `config.json`.
        reader: Reads the tensors of the blueprint by name.
        folder: The model's folder, with the tokenizer.
        out: The folder to write; hashes of written files may be added to it.
        options: With the dtype set.
    """

    name: str
    blueprint: Blueprint
    config: dict
    reader: "TensorSource"
    folder: Path
    out: "AtomicFolder"
    options: ExportOptions

    @property
    def dtype(self) -> "torch.dtype":
        """Dtype of weights that are not quantised."""
        import torch

        assert self.options.dtype is not None
        return getattr(torch, self.options.dtype)


class ExportTarget(ABC):
    """A format that models can be exported to. Its file imports torch and other heavy modules only in `write`."""

    name: ClassVar[str]
    """The value of `--to`."""
    url: ClassVar[str]
    """Documentation of the format."""
    summary: ClassVar[str]
    """One line for listings."""
    engines: ClassVar[tuple[str, ...]]
    """Engines that read the format, such as `llama.cpp`."""
    usage: ClassVar[str]
    """Code that loads the exported folder, for the model card."""
    quantisations: ClassVar[tuple[str, ...]] = ()
    """Values of `--quantise`, beside `float`."""
    has_stored_formats: ClassVar[bool] = False
    """Whether weights that the model stores as integers keep them without `--quantise`."""

    @abstractmethod
    def judge(self, blueprint: Blueprint) -> Verdict:
        """Says how the target holds a model; reads no weights."""

    @abstractmethod
    def count_bytes(self, blueprint: Blueprint, options: ExportOptions) -> int:
        """Returns the bytes of the exported weights of a model that the target can hold."""

    @abstractmethod
    def write(self, job: ExportJob) -> tuple[str, ...]:
        """Writes weights and config into the job's folder; companions, card and provenance are written by `export`.

        Returns:
            Sentences for the model card.

        Raises:
            ExportError: The target cannot hold the model.
        """

    def check(self, options: ExportOptions) -> None:
        """Checks the options.

        Raises:
            ExportError: The dtype is none for weights, the target has no such quantisation, or takes no `keep`.
        """
        if options.dtype is not None and options.dtype not in DTYPES:
            raise ExportError(f"export: dtype: {must_be_one_of(options.dtype, DTYPES)}")
        if options.quantise not in (None, FLOATS, *self.quantisations):
            if not self.quantisations:
                raise ExportError(
                    f"export: quantise: {self.name} stores floats only (got {options.quantise!r}); omit it"
                )
            raise ExportError(f"export: quantise: {must_be_one_of(options.quantise, (*self.quantisations, FLOATS))}")
        if options.keep and options.quantise in (None, FLOATS):
            raise ExportError(
                f"export: keep: quantise is required with it (got {options.quantise or 'none'}); pass --quantise, or "
                f"omit --keep"
            )

    def settle(self, options: ExportOptions, blueprint: Blueprint) -> ExportOptions:
        """Returns checked options for a model: without `quantise`, integers of the model are kept where possible."""
        if options.quantise is None and self.has_stored_formats:
            return replace(options, keeps_integers=holds_integers(blueprint))
        return replace(options, quantise=None) if options.quantise == FLOATS else options


class FileTarget(ExportTarget):
    """A target that can write one file instead of a folder."""

    suffix: ClassVar[str]
    """The ending of an output's name that asks for one file."""

    @abstractmethod
    def write_file(
        self, model: "OpenedModel", options: ExportOptions, path: Path, stages: Sequence["Stage"]
    ) -> tuple[str, ...]:
        """Writes the model as one file, which names the stages that made it.

        Returns:
            Sentences about the file.

        Raises:
            ExportError: The target cannot hold the model.
        """

    @abstractmethod
    def is_own_file(self, path: Path) -> bool:
        """Tells whether refold wrote an existing file, which may then be overwritten."""
