"""What an evaluation says of its data: files with sizes and hashes."""

from pathlib import Path

from refold.checkpoint.manifest import hash_file
from refold.data.readers import DataSource
from refold.errors import DataError
from refold.evaluation.result import DataFile


def describe_data(source: DataSource) -> tuple[DataFile, ...]:
    """Hashes the files of a data source; documents in memory go by their name and digest.

    Raises:
        DataError: A file cannot be read.
    """
    paths: dict[Path, None] = {}
    num_bytes = 0
    for block in source.blocks:
        path = getattr(block, "path", None)
        if path is None:
            num_bytes += sum(len(text.encode()) for text in block.documents())
        else:
            paths[path] = None
    if not paths:
        return (DataFile(name=source.name, bytes=num_bytes, sha256=source.identity),)
    try:
        return tuple(DataFile(name=str(path), bytes=path.stat().st_size, sha256=hash_file(path)) for path in paths)
    except OSError as error:
        raise DataError(f"data: readable files are required ({error.filename}: {error.strerror})") from error
