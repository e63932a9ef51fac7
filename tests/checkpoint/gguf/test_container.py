import contextlib
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refold.checkpoint.gguf import container
from refold.checkpoint.gguf.block_types import BLOCK_TYPES, QUANTISED
from refold.checkpoint.gguf.container import read_gguf, shortest_float32
from refold.errors import SourceError

U32, F32, BOOL, TEXT, LIST = 4, 6, 7, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def described(name: str, shape: Sequence[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file_of(
    entries: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    version: int = 3,
    num_entries: int | None = None,
    num_tensors: int | None = None,
) -> bytes:
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(entries) if num_entries is None else num_entries,
    )
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def parse(tmp_path: Path, raw: bytes) -> container.GgufFile:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    return read_gguf(path)


GOOD = file_of(
    [
        entry("a.n", U32, struct.pack("<I", 7)),
        entry("a.t", TEXT, text("é")),
        entry("a.f", F32, struct.pack("<f", 1e-5)),
    ],
    [described("x", (4, 2), 0, 0), described("y", (32,), 8, 32)],
    bytes(32) + bytes(34),
)


def test_metadata_and_places_are_read(tmp_path: Path) -> None:
    found = parse(tmp_path, GOOD)
    assert dict(found.metadata) == {"a.n": 7, "a.t": "é", "a.f": 1e-5}
    start = len(GOOD) - 66
    x, y = found.tensors["x"], found.tensors["y"]
    assert (x.dtype, x.shape, x.file, x.start, x.end) == ("F32", (2, 4), "m.gguf", start, start + 32)
    assert (y.dtype, y.shape, y.start, y.end) == ("Q8_0", (32,), start + 32, start + 66)


def test_the_shortest_decimal_stands_for_a_number_of_32_bits() -> None:
    assert shortest_float32(struct.unpack("<f", struct.pack("<f", 0.1))[0]) == 0.1
    assert shortest_float32(500000.0) == 500000.0
    assert shortest_float32(3.4028234663852886e38) == 3.4028234663852886e38
    assert shortest_float32(float("inf")) == float("inf")


def test_types_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf names the types")
    known = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    # The package counts one float too many in blocks of Q8_1, which no file holds.
    assert {n: tuple(BLOCK_TYPES[n]) for n in known if n != 9} == {n: e for n, e in known.items() if n != 9}
    readable = {kind.name for kind in gguf.quants._type_traits} - {"BF16"}
    assert readable - {"NVFP4"} == QUANTISED


def nested() -> bytes:
    return entry("a", LIST, struct.pack("<IQ", LIST, 1) + struct.pack("<IQ", U32, 0))


TENSOR = described("x", (4,), 0, 0)
BAD = {
    "empty": (b"", r"truncated: the mark GGUF at its beginning needs 4 bytes \(got 0\)"),
    "not gguf": (b"PK\3\4" + bytes(50), r"does not begin with the mark GGUF\); check the path"),
    "before gguf": (b"tjgg" + bytes(50), r"got ggjt, an older format of llama.cpp"),
    "version 1": (file_of(version=1), r"GGUF version 2 or 3 is required \(got 1\); convert it with a current llama"),
    "version 9": (file_of(version=9), r"GGUF version 2 or 3 is required \(got 9\)"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"little-endian order are required \(got a big-endian"),
    "cut in counts": (GOOD[:20], r"truncated: the number of metadata keys needs 24 bytes \(got 20\)"),
    "cut in metadata": (GOOD[:30], r"at most \d+ metadata keys are possible|truncated"),
    "cut in data": (GOOD[:-1], r"truncated: [\d,]+ bytes are required"),
    "many keys": (file_of(num_entries=2**40), r"at most \d+ metadata keys are possible in this file"),
    "many tensors": (file_of(num_tensors=2**63), r"at most \d+ tensors are possible in this file"),
    "long text": (file_of([entry("a", TEXT, struct.pack("<Q", 2**50))]), r"a must be at most 16,777,216 bytes long"),
    "text past the end": (file_of([entry("a", TEXT, struct.pack("<Q", 2**20))]), r"truncated: a needs"),
    "long list": (file_of([entry("a", LIST, struct.pack("<IQ", U32, 2**40))]), r"at most \d+ items of a are possible"),
    "list of lists": (file_of([nested()]), r"a list of numbers or texts is required \(got a list of lists\)"),
    "list type": (file_of([entry("a", LIST, struct.pack("<IQ", 77, 1))]), r"metadata a: type must be at most 12 .*77"),
    "value type": (file_of([entry("a", 13, b"")]), r"metadata a: type must be at most 12 \(got 13\)"),
    "truth value": (file_of([entry("a", BOOL, b"\2")]), r"0 or 1 is required for true or false \(got 2\)"),
    "key twice": (file_of([entry("a", BOOL, b"\1")] * 2), r"each metadata key is required once \(got a twice\)"),
    "key not UTF-8": (file_of([entry(b"\xff", BOOL, b"\1")]), r"a metadata key in UTF-8 is required"),
    "tensor twice": (file_of([], [TENSOR] * 2, bytes(64)), r"each tensor is required once \(got x twice\)"),
    "no dimensions": (file_of([], [described("x", (), 0, 0)]), r"tensor x: 1 to 4 dimensions are required \(got 0\)"),
    "5 dimensions": (file_of([], [described("x", (1,) * 5, 0, 0)], bytes(32)), r"1 to 4 dimensions .* \(got 5\)"),
    "size 0": (file_of([], [described("x", (4, 0), 0, 0)]), r"sizes from 1 to .* are required \(got \[4, 0\]\)"),
    "size 2^63": (file_of([], [described("x", (2**63, 8), 0, 0)]), r"sizes from 1 to .* are required"),
    "unknown type": (file_of([], [described("x", (4,), 99, 0)]), r"a known number type is required \(got type 99\)"),
    "removed type": (file_of([], [described("x", (32,), 31, 0)]), r"got Q4_0_4_4, which llama.cpp no longer reads"),
    "odd width": (file_of([], [described("x", (31,), 2, 0)]), r"rows of Q4_0 must be a multiple of 32 wide \(got 31\)"),
    "overlap": (file_of([], [TENSOR, described("y", (4,), 0, 0)], bytes(64)), r"overlaps the one before: starts at 0"),
    "gap": (file_of([], [TENSOR, described("y", (4,), 0, 64)], bytes(99)), r"leaves a gap before it: starts at 64"),
    "first gap": (file_of([], [described("y", (4,), 0, 32)], bytes(99)), r"leaves a gap before it: starts at 32"),
    "offset 2^63": (file_of([], [described("x", (4,), 0, 2**63)], bytes(32)), r"leaves a gap before it"),
    "no data": (file_of([], [described("x", (2**30, 2**30), 0, 0)]), r"truncated: [\d,]+ bytes are required"),
    "alignment 0": (
        file_of([entry("general.alignment", U32, struct.pack("<I", 0))]),
        r"general.alignment: a power of two is required \(got 0\)",
    ),
    "alignment text": (
        file_of([entry("general.alignment", TEXT, text("32"))]),
        r"general.alignment: a power of two is required \(got 32\)",
    ),
    "long name": (file_of([], [described("x" * 200, (4,), 0, 0)]), r"a tensor name must be at most 128 bytes long"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_broken_header_is_named(fault: str, tmp_path: Path) -> None:
    raw, message = BAD[fault]
    with pytest.raises(SourceError, match=message):
        parse(tmp_path, raw)


def test_a_whole_header_has_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_HEADER_BYTES", 30)
    with pytest.raises(SourceError, match=r"metadata must be at most 30 bytes \(got more at a.n\)"):
        parse(tmp_path, GOOD)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").mkdir()
    with pytest.raises(SourceError, match="cannot be read"):
        read_gguf(tmp_path / "m.gguf")


@settings(max_examples=300)
@given(
    place=st.integers(0, len(GOOD) - 67),
    value=st.binary(min_size=1, max_size=8),
    cut=st.one_of(st.none(), st.integers(0, len(GOOD))),
)
def test_any_change_of_the_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: bytes, cut: int | None
) -> None:
    raw = (GOOD[:place] + value + GOOD[place + len(value) :])[:cut]
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(raw)
    try:
        found = read_gguf(path)
    except SourceError:
        return
    assert all(0 < info.start <= info.end <= len(raw) for info in found.tensors.values())


@settings(max_examples=100)
@given(raw=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + raw)
    with contextlib.suppress(SourceError):
        read_gguf(path)
