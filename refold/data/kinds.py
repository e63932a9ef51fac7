"""Kinds of data files, recognised by their first bytes and the ending of their name."""

import csv
import gzip
import json
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import pyarrow as pa

from refold.data.field import Field, OtherContentError
from refold.errors import DataError

FileLayout = Literal["text", "json_lines", "json", "csv", "parquet"]
"""`json_lines`: one row per line; `json`: one array of rows, or a sequence of rows over any number of lines."""
Compression = Literal["", "gzip", "zstd"]

HEAD_BYTES = 2**16
"""Bytes at the beginning of a file, after decompression, that decide its kind."""
LONGEST_RECORD = 2**28
"""Limit in bytes for a row, a line or a field."""
TEXT_ENDINGS = (".txt", ".md", ".py")
ROW_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
BROKEN = (OSError, EOFError, zlib.error, pa.ArrowException)
"""Errors of reading a file that is truncated or damaged."""

_COMPRESSED: dict[bytes, Compression] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}
_PDF = "a PDF", "extract its text first, for instance with `pdftotext`"
_ZIP = "a zip archive, as docx, epub, xlsx and npz files are", "unpack it, or save the document as plain text"
_PICKLE = "a pickle, which can run code and is never loaded", "save the texts as JSON lines or parquet"
_IMAGE = "an image", "give text"
_SOUND = "a sound or video file", "give a transcript"
_ARCHIVE = "an archive", "unpack it and give the folder"
_UTF_16 = "text in UTF-16", "convert it first, for instance with `iconv -f UTF-16 -t UTF-8`"
_WEIGHTS = "model weights", "give text"
_PACKED = "compressed in another way than .gz and .zst", "decompress it first"
_ARROW = "an Arrow file", "save it as parquet, or give the `datasets.Dataset` itself from Python"
_BINARY = "a binary file: NUL bytes", "give text, JSON lines, CSV or parquet"
_REFUSED: tuple[tuple[bytes, tuple[str, str]], ...] = (
    (b"%PDF", _PDF),
    (b"PK\x03\x04", _ZIP),
    (b"PK\x05\x06", _ZIP),
    *((b"\x80" + bytes([protocol]), _PICKLE) for protocol in range(2, 6)),
    (b"\x89PNG", _IMAGE),
    (b"\xff\xd8\xff", _IMAGE),
    (b"GIF8", _IMAGE),
    (b"II*\0", _IMAGE),
    (b"MM\0*", _IMAGE),
    (b"RIFF", _SOUND),
    (b"OggS", _SOUND),
    (b"fLaC", _SOUND),
    (b"ID3", _SOUND),
    (b"GGUF", _WEIGHTS),
    (b"\x93NUMPY", ("a NumPy array", "save texts as JSON lines or parquet")),
    (b"ARROW1", _ARROW),
    (b"\xff\xff\xff\xff", _ARROW),
    (b"SQLite format 3", ("a database", "export the texts as JSON lines or CSV")),
    (b"\x7fELF", ("a program", "give text")),
    (b"7z\xbc\xaf", _ARCHIVE),
    (b"Rar!", _ARCHIVE),
    (b"BZh", _PACKED),
    (b"\xfd7zXZ", _PACKED),
    (b"\x04\x22\x4d\x18", _PACKED),
    (b"\xd0\xcf\x11\xe0", ("an old Office document", "save it as plain text")),
    (b"{\\rtf", ("a rich text document", "save it as plain text")),
    (b"\xff\xfe", _UTF_16),
    (b"\xfe\xff", _UTF_16),
)
_REFUSED_ENDINGS = {".pkl": _PICKLE, ".pickle": _PICKLE, ".joblib": _PICKLE, ".safetensors": _WEIGHTS}


@runtime_checkable
class ByteStream(Protocol):
    """A stream of decompressed bytes, read from the beginning."""

    def read(self, size: int, /) -> bytes: ...

    def readline(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class FileKind:
    """Layout and compression of a data file.

    Attributes:
        layout: Layout of the documents in the file.
        compression: Kind of compression, or empty.
        delimiter: Delimiter between the fields of a CSV row.
    """

    layout: FileLayout
    compression: Compression = ""
    delimiter: str = ""

    @property
    def reads_from_start(self) -> bool:
        """Whether the file can be read only from its beginning."""
        return bool(self.compression) or self.layout in ("json", "csv")

    def __str__(self) -> str:
        """Returns the name of the kind for messages."""
        names = {"text": "plain text", "json_lines": "JSON lines", "json": "JSON", "csv": "CSV", "parquet": "parquet"}
        return names[self.layout] + (f" ({self.compression})" if self.compression else "")


def endings(path: Path) -> tuple[str, Compression]:
    """Returns the ending of a file's name without compression, in lower case, and the compression in its name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1], "") if suffixes else ""
    if compression:
        suffixes.pop()
    return suffixes[-1] if suffixes else "", compression


def recognise(path: Path, field: Field) -> FileKind:
    """Returns the kind of a file that is not empty.

    Args:
        path: The file.
        field: The field of the documents. A file that looks like JSON counts as rows only if it has this field.

    Raises:
        DataError: The file is of a kind that refold refuses (named in the message), or cannot be read.
    """
    require_file(path)
    ending, _ = endings(path)
    if ending in _REFUSED_ENDINGS:
        raise _refused(path, *_REFUSED_ENDINGS[ending])
    raw = _read_head(path, "")
    compression = _compression(raw)
    head = _read_head(path, compression) if compression else raw
    if head.startswith(b"PAR1") or ending == ".parquet":
        return FileKind("parquet", compression)
    for magic, (name, mend) in _REFUSED:
        if head.startswith(magic):
            raise _refused(path, name, mend)
    if head[257:262] == b"ustar":
        raise _refused(path, *_ARCHIVE)
    if _compression(head):
        raise _refused(path, "compressed twice", "decompress it first")
    if b"\0" in head:
        raise _refused(path, *_BINARY)
    layout, delimiter = _layout(head.removeprefix(b"\xef\xbb\xbf"), ending, field)
    return FileKind(layout, compression, delimiter)


def _compression(head: bytes) -> Compression:
    """Returns the compression that the first bytes of a file show."""
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            return name
    return ""


def require_file(path: Path) -> None:
    """Checks that a path is a regular file, because reading a pipe may block and works only once.

    Raises:
        DataError: The file is missing or of another type.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(mode):
        raise OtherContentError(
            f"{path}: a regular file is required (got a pipe or a device); write the text to a file first"
        )


@contextmanager
def open_stream(path: Path, compression: Compression) -> Iterator[ByteStream]:
    """Opens a file as a stream that decompresses while it is read.

    Raises:
        DataError: The file cannot be read, or is truncated or damaged; also raised while the `with` body reads.
    """
    try:
        with path.open("rb") as file:
            if compression == "gzip":
                stream: Any = gzip.GzipFile(fileobj=file)
            elif compression == "zstd":
                # Not closed through Arrow, which would close the file a second time.
                stream = _ArrowStream(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"))
            else:
                stream = file
            yield stream
    except BROKEN as error:
        raise unreadable(path, error, compression) from error


class _ArrowStream:
    """An Arrow stream with the methods of `ByteStream`; Arrow's own `readline` is not implemented."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._left = stream, b""

    def read(self, size: int) -> bytes:
        parts, have = [self._left], len(self._left)
        self._left = b""
        while have < size and (part := self._stream.read(max(HEAD_BYTES, size - have))):
            parts.append(part)
            have += len(part)
        raw = b"".join(parts)
        self._left = raw[size:]
        return raw[:size]

    def readline(self, size: int) -> bytes:
        parts, have = [], 0
        while have < size and (part := self.read(min(HEAD_BYTES, size - have))):
            end = part.find(b"\n") + 1
            if end:
                self._left = part[end:] + self._left
                part = part[:end]
            parts.append(part)
            have += len(part)
            if end:
                break
        return b"".join(parts)


def unreadable(path: Path, error: Exception, compression: Compression = "") -> DataError:
    """Returns the error for a file that cannot be read."""
    reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
    if compression and getattr(error, "errno", None) is None:
        return DataError(f"{path}: a whole {compression} file is required ({reason}); fetch or compress it again")
    return DataError(f"{path}: a readable file is required ({reason})")


def _read_head(path: Path, compression: Compression) -> bytes:
    with open_stream(path, compression) as stream:
        try:
            return stream.read(HEAD_BYTES)
        except EOFError:
            # A truncated file shorter than a head; reading its documents raises the error.
            return b""


def _layout(head: bytes, ending: str, field: Field) -> tuple[FileLayout, str]:
    if ending in _DELIMITERS:
        return "csv", _delimiter(head, _DELIMITERS[ending], field)
    begin = head.lstrip()
    line = begin.partition(b"\n")[0]
    if ending in (".jsonl", ".ndjson", ".json"):
        if begin.startswith(b"[") or line.strip() == b"{":
            return "json", ""
        return "json" if ending == ".json" and not isinstance(_parse(line), dict) else "json_lines", ""
    # With any other ending the file is rows if the first row has the field, else text.
    row = begin[1:].lstrip() if begin.startswith(b"[") else begin
    if not row.startswith(b"{"):
        return "text", ""
    value = first_value(row)
    if isinstance(value, dict):
        has_field = field.name in value
    else:
        # The first row is longer than the head; the field may begin in the head.
        key = re.escape(json.dumps(field.name, ensure_ascii=False).encode())
        has_field = len(head) > HEAD_BYTES - 8 and re.search(key + rb"\s*:\s*[\"\[]", row) is not None
    if not has_field:
        return "text", ""
    return ("json_lines" if isinstance(_parse(line), dict) else "json"), ""


def _parse(line: bytes) -> object:
    """Returns the value of a line of JSON, or None if the line is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def first_value(raw: bytes) -> object:
    """Returns the first JSON value in some bytes, or None if there is no complete value."""
    try:
        return json.JSONDecoder().raw_decode(raw.decode("utf-8", "ignore"))[0]
    except (ValueError, RecursionError):
        return None


def _delimiter(head: bytes, candidates: str, field: Field) -> str:
    """Returns the first delimiter with which the header row has the field, or the default delimiter."""
    first = head.decode("utf-8", "replace").lstrip().splitlines()[:1]
    for each in candidates:
        if field.name in header_of(first, each):
            return each
    return candidates[0]


def header_of(lines: Sequence[str], delimiter: str) -> list[str]:
    """Returns the names in a CSV header, or an empty list if it cannot be parsed."""
    try:
        return [name.strip() for name in next(csv.reader(lines, delimiter=delimiter), [])]
    except csv.Error:
        return []


def _refused(path: Path, name: str, mend: str) -> OtherContentError:
    return OtherContentError(f"{path}: text, JSON lines, CSV or parquet is required (got {name}); {mend}")
