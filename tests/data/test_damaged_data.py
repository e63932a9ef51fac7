"""Thousands of damaged data files are each read or refused with one line in short time."""

import gzip
import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refold.data.corpus import open_text
from refold.errors import RefoldError

SECONDS = 20
NAMES = ("a.txt", "a.jsonl", "a.json", "a.ndjson", "a.csv", "a.tsv", "a.parquet", "a", "a.md", "a.JSONL")
ENCODINGS = ("utf-8", "utf-16", "utf-16-le", "utf-32", "latin-1", "utf-7", "cp1252", "utf-8-sig")


def _words(rng: random.Random, count: int) -> str:
    return " ".join(
        rng.choice(("the", "sea", "née", "漢字", "🙂", '"', ",", "\n", "\r", "\t", "{", "]")) for _ in range(count)
    )


def _rows(rng: random.Random) -> list[Any]:
    values: list[Any] = [
        None,
        3,
        1e308,
        True,
        [],
        {},
        "\ud800",
        "\0",
        "x" * 5000,
        {"text": "a"},
        ["a"],
        "a" * rng.randrange(99),
    ]
    rows: list[Any] = [{"text": _words(rng, rng.randrange(30)), "id": number} for number in range(rng.randrange(1, 40))]
    for _ in range(rng.randrange(3)):
        rows[rng.randrange(len(rows))] = rng.choice([rng.choice(values), {"text": rng.choice(values)}, {"texts": "a"}])
    return rows


def _parquet(rng: random.Random) -> bytes:
    columns: list[Any] = [["a", "b", None], [1, 2, 3], [b"a", b"\xff", b"c"], [["a"], [], None], [_words(rng, 9)] * 3]
    names = rng.sample(["text", "texts", "", "text\0", "messages"], 2)
    file = io.BytesIO()
    pq.write_table(pa.table([rng.choice(columns), rng.choice(columns)], names=names), file, row_group_size=2)
    return file.getvalue()


def _csv(rng: random.Random) -> bytes:
    delimiter = rng.choice(",;\t|")
    rows = [
        delimiter.join(rng.choice(("text", "id", '"', "a b", '"x""y"', "", "\0")) for _ in range(3)) for _ in range(9)
    ]
    return rng.choice(("\n", "\r\n", "\r")).join([delimiter.join(("id", "text", "other")), *rows]).encode()


MAKE: tuple[Callable[[random.Random], bytes], ...] = (
    lambda rng: rng.randbytes(rng.randrange(2000)),
    lambda rng: _words(rng, rng.randrange(500)).encode(rng.choice(ENCODINGS), "replace"),
    lambda rng: "\n".join(json.dumps(row) for row in _rows(rng)).encode(),
    lambda rng: json.dumps(_rows(rng), indent=rng.choice((None, 1))).encode(),
    lambda rng: b'{"text": ' + rng.choice((b"[", b'{"a":', b'"\\u', b"1", b"-", b"tru")) * rng.choice((1, 9, 200_000)),
    lambda rng: b"[" + rng.choice((b"[", b'{"text":"a"},', b"1,", b" ", b"\n", b",")) * rng.choice((1, 9, 100_000)),
    lambda rng: b'{"text": "' + bytes([rng.randrange(32, 127)]) * rng.choice((9, 10**6, 10**7)),
    lambda rng: rng.choice((b" ", b"\0", b"\n", b'"', b"\xff", b"a,", b"\r")) * rng.choice((1, 9, 10**6)),
    _parquet,
    _csv,
)


def _damage(rng: random.Random, raw: bytes) -> bytes:
    choice = rng.randrange(6)
    if choice == 0:
        return raw[: rng.randrange(len(raw) + 1)]
    if choice in (1, 2) and raw:
        array = bytearray(raw)
        for _ in range(rng.choice((1, 3, 30))):
            array[rng.randrange(len(array))] = rng.randrange(256)
        return bytes(array)
    if choice == 3:
        place = rng.randrange(len(raw) + 1)
        return raw[:place] + rng.choice((b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b'"', b"\x1f\x8b")) + raw[place:]
    return raw


def _case(seed: int) -> tuple[str, bytes]:
    rng = random.Random(seed)
    raw = _damage(rng, rng.choice(MAKE)(rng))
    ending = rng.choice(("", "", ".gz", ".zst"))
    if ending and rng.random() < 0.9:
        raw = _damage(rng, gzip.compress(raw, 1) if ending == ".gz" else pa.compress(raw, "zstd", asbytes=True))
    return rng.choice(NAMES) + ending, raw


def _check(seed: int, folder: Path) -> None:
    name, raw = _case(seed)
    path = folder / name
    path.write_bytes(raw)
    data = (str(path), folder, f"{path}?field=id", [path, path])[seed % 4]
    began, said = time.monotonic(), ""
    try:
        for number, document in enumerate(open_text(data).documents(seed % 2 or None)):
            assert isinstance(document, str)
            assert number < 10**6
    except RefoldError as error:
        said = str(error)
    except Exception as error:
        raise AssertionError(f"case {seed}: {name}: {error!r}") from error
    assert "\n" not in said, f"case {seed}"
    assert len(said) < 1500, f"case {seed}"
    # A bound against hanging, not a measurement.
    assert time.monotonic() - began < SECONDS, f"case {seed}"
    path.unlink()


@pytest.mark.parametrize("first", range(0, 150, 50))
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, first: int):
    for seed in range(first, first + 50):
        _check(seed, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, 2000, 100))
def test_two_thousand_damaged_files_are_read_or_refused(tmp_path: Path, first: int):
    for seed in range(1000 + first, 1000 + first + 100):
        _check(seed, tmp_path)


def test_objects_that_are_no_data_are_refused():
    refused = sum(_is_refused(random.Random(seed)) for seed in range(200))
    assert refused > 150


def _is_refused(rng: random.Random) -> bool:
    odd: list[Any] = [
        None,
        3,
        1.5,
        b"raw",
        object(),
        [],
        {},
        (),
        "",
        "\0",
        "x" * 5000,
        "a\nb",
        "hf://",
        "://",
        "=1",
        "?",
        "~",
    ]
    data: Any = rng.choice([rng.choice(odd), rng.sample(odd, 2), [{"text": rng.choice(odd)}], iter(rng.sample(odd, 3))])
    try:
        return not all(isinstance(document, str) and document for document in open_text(data).documents())
    except RefoldError:
        return True
