"""A source model: its config, family and tensor headers, and the record of a source in plans and measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from refold.blueprint.source_tensors import SourcePiece, SourceTensor
from refold.checkpoint.expected_tensors import ExpectedTensors, expect_tensors
from refold.checkpoint.headers import DTYPE_BYTES, CheckpointHeaders, config_dtype, describe_quantised, stored_dtype
from refold.checkpoint.locate import Source, is_same_source, locate
from refold.errors import SourceError
from refold.families.arch import ArchSpec, Family, Frozen
from refold.recipe.recipe import IgnoredTensor


@dataclass(frozen=True)
class SourceModel:
    """A source checkpoint with the content of its config and headers.

    Attributes:
        source: The folder or hub model.
        dtype: Torch name of the most frequent dtype of its numbers.
        tensors: The tensors that its architecture must have.
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
        """The tensors that the architecture must have, by name."""
        return self.tensors.tensors

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the plan: tensors that contradict the config, and the types of a quantised source."""
        quantised = None if self.headers is None else describe_quantised(self.headers, self.dtype)
        return (*self.tensors.notes, *(() if quantised is None else (quantised,)))

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    def locate(self, canonical: str, layer: int | None = None) -> SourcePiece:
        """Finds a canonical tensor, such as `mixer.q_proj.weight`, in this checkpoint."""
        return self.tensors.locate(canonical, layer)

    def check_tensors(self, ignore: Sequence[IgnoredTensor] = ()) -> dict[str, tuple[str, str]]:
        """Checks the checkpoint's tensors against those of the architecture; see `ExpectedTensors.check`."""
        return self.tensors.check(ignore)


def read_source_model(source: str | Path | Source) -> SourceModel:
    """Reads only `config.json` and the safetensors headers of a source.

    Args:
        source: A folder (with or without weights), a hub id, or the result of `locate`.

    Raises:
        SourceError: The source is missing, of an unknown family or damaged, or its weights are not floats.
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
    """The identity of a source: its place, its family and its hashes."""

    path: str | None
    """The folder; None for a hub model."""
    id: str | None
    """The hub id; None for a folder."""
    revision: str | None
    model_type: str
    config_sha256: str | None
    index_sha256: str | None
    """Hash of the index file, or of the header of a single weight file; None without weights."""
    dtype: str
    sample_sha256: str | None = None
    """Hash of a sample of every tensor; None for a hub model."""
    files_sha256: str | None = None
    """Hash of the hashes of all weight files; None if those are unknown."""

    def is_of(self, source: Source) -> bool:
        """Says whether the record may describe a source: all hashes known of both are equal."""
        found = source.fingerprint()
        return is_same_source(dict(self), found)


def record_source(model: SourceModel) -> SourceRecord:
    """Returns the record of a source model."""
    source = model.source
    return SourceRecord(
        path=None if source.path is None else str(source.path.resolve()),
        id=source.hub_id,
        revision=source.revision,
        model_type=model.family.model_type,
        dtype=model.dtype,
        **source.fingerprint(),
    )
