"""A source model: its config, family and headers, and the record of it that is written down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from refold.blueprint.source_tensors import SourcePiece, SourceTensor
from refold.checkpoint.expected_tensors import ExpectedTensors, expect_tensors
from refold.checkpoint.headers import CheckpointHeaders
from refold.checkpoint.locate import Source, is_same_source, locate
from refold.checkpoint.stored_dtype import DTYPE_BYTES, config_dtype, stored_dtype
from refold.errors import SourceError
from refold.families.arch import ArchSpec, Frozen
from refold.families.family import Family
from refold.recipe.recipe import IgnoredTensor


@dataclass(frozen=True)
class SourceModel:
    """A source checkpoint and what its config and headers say.

    Attributes:
        source: Where it lies.
        dtype: Torch name of the dtype most of its numbers have.
        tensors: The tensors its architecture must have.
    """

    source: Source
    dtype: str
    tensors: ExpectedTensors

    @property
    def arch(self) -> ArchSpec:
        return self.tensors.arch

    @property
    def family(self) -> Family:
        return self.tensors.family

    @property
    def headers(self) -> CheckpointHeaders | None:
        return self.tensors.headers

    @property
    def expected(self) -> Mapping[str, SourceTensor]:
        """The tensors its architecture must have, by name."""
        return self.tensors.tensors

    @property
    def notes(self) -> tuple[str, ...]:
        """Decisions against the config, for the plan."""
        return self.tensors.notes

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    def locate(self, canonical: str, layer: int | None = None) -> SourcePiece:
        """Finds a canonical tensor, such as `mixer.q_proj.weight`, in this checkpoint."""
        return self.tensors.locate(canonical, layer)

    def check_tensors(self, ignore: Sequence[IgnoredTensor] = ()) -> dict[str, tuple[str, str]]:
        """Holds the checkpoint's tensors against those the architecture must have; see `ExpectedTensors.check`."""
        return self.tensors.check(ignore)


def read_source_model(source: str | Path | Source) -> SourceModel:
    """Reads `config.json` and safetensors headers of a source, nothing else.

    Args:
        source: A folder, a hub id, or what `locate` returned. A folder without weights will do.

    Raises:
        SourceError: Nothing there, an unknown family, a broken file, or weights that are not plain floats.
    """
    located = source if isinstance(source, Source) else locate(source)
    config = located.read_config()
    if config.get("model_type") == "refold":
        raise SourceError(
            f"{located.where}: a transformers checkpoint is required (got a folder refold wrote); give the source it "
            f"was made from, or export it first"
        )
    tensors = expect_tensors(located, config)
    if tensors.headers is None:
        dtype = config_dtype(config)
    else:
        dtype = stored_dtype(located.where, tensors.headers, tensors.tensors)
    return SourceModel(located, dtype, tensors)


class SourceRecord(Frozen):
    """A source, by what it is and where it lay."""

    path: str | None
    """Its folder; None on the hub."""
    id: str | None
    """Its hub id; None in a folder."""
    revision: str | None
    model_type: str
    config_sha256: str | None
    index_sha256: str | None
    """Of the index file or the single file's header; None without weights."""
    dtype: str
    sample_sha256: str | None = None
    """Of a sample of every tensor; None on the hub."""
    files_sha256: str | None = None
    """Of the weight files' own hashes; None where they are not known."""

    def is_of(self, source: Source) -> bool:
        """Whether it may be this source: all of the fingerprint that is known of both is the same."""
        found = source.fingerprint()
        return is_same_source(dict(self), found)


def record_source(model: SourceModel) -> SourceRecord:
    """Describes a source that has been read."""
    source = model.source
    return SourceRecord(
        path=None if source.path is None else str(source.path.resolve()),
        id=source.hub_id,
        revision=source.revision,
        model_type=model.family.model_type,
        dtype=model.dtype,
        **source.fingerprint(),
    )
