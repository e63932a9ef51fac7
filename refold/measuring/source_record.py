"""Which source something was made for, as it stands in files."""

from refold.checkpoint.locate import Source
from refold.families.arch import Frozen
from refold.measuring.source_model import SourceModel


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

    def is_of(self, source: Source) -> bool:
        """Whether it may be this source: its config, and where both have weights their headers, are the same."""
        found = source.fingerprint()
        pairs = ((self.config_sha256, found["config_sha256"]), (self.index_sha256, found["index_sha256"]))
        return all(ours is None or theirs is None or ours == theirs for ours, theirs in pairs)


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
