"""Kinds of data files: all kinds give the same texts, and other files are refused with a reason."""

import gzip
import io
import json
import logging
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refold.data.readers import DataSource, open_data
from refold.errors import DataError

TEXTS = [f'document {index}: "äöü", 漢字\nsecond line {"x, " * (index % 7)}' for index in range(40)]


def _rows(field: str = "text") -> list[dict[str, object]]:
    return [{"id": index, field: text} for index, text in enumerate(TEXTS)]


def _csv(delimiter: str, field: str = "text") -> bytes:
    import csv

    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(["id", field])
    writer.writerows([index, text] for index, text in enumerate(TEXTS))
    return file.getvalue().encode()


def _parquet(field: str = "text") -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(_rows(field)), file, row_group_size=7)
    return file.getvalue()


KINDS: dict[str, Callable[[str], bytes]] = {
    "jsonl": lambda field: b"".join(json.dumps(row).encode() + b"\n" for row in _rows(field)),
    "ndjson": lambda field: b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\r\n" for row in _rows(field)),
    "JSONL": lambda field: b"".join(json.dumps(row).encode() + b"\n" for row in _rows(field)),
    "json": lambda field: json.dumps(_rows(field)).encode(),
    "Json": lambda field: b"\xef\xbb\xbf" + json.dumps(_rows(field), indent=2, ensure_ascii=False).encode(),
    "lines.json": lambda field: b"".join(json.dumps(row).encode() + b"\n" for row in _rows(field)),
    "pretty.json": lambda field: b"\n".join(json.dumps(row, indent=1).encode() for row in _rows(field)),
    "csv": lambda field: _csv(",", field),
    "semicolons.csv": lambda field: _csv(";", field),
    "tsv": lambda field: _csv("\t", field),
    "parquet": _parquet,
}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda raw: raw,
    ".gz": lambda raw: gzip.compress(raw[:100]) + gzip.compress(raw[100:]),
    ".zst": lambda raw: pa.compress(raw[:100], "zstd", asbytes=True) + pa.compress(raw[100:], "zstd", asbytes=True),
    ".GZ": gzip.compress,
}


def _read(source: DataSource) -> list[str]:
    return list(source.documents())


def _stored(folder: Path, name: str, raw: bytes) -> Path:
    (folder / name).write_bytes(raw)
    return folder / name


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_documents(tmp_path: Path, kind: str, compression: str):
    for field in ("text", "body"):
        raw = COMPRESS[compression](KINDS[kind](field))
        path = _stored(tmp_path, f"a.{kind}{compression}", raw)
        assert _read(open_data(path, field=field)) == TEXTS
        # The content decides where the name says nothing, as in a download cache.
        if kind not in ("csv", "tsv", "semicolons.csv"):
            assert _read(open_data(_stored(tmp_path, "blob", raw), field=field)) == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
def test_compressed_text_comes_in_whole_pieces(tmp_path: Path, compression: str):
    text = "".join(f"zeile {index} ü漢🙂{' und weiter' * (index % 5)}\n" for index in range(300)) + "end 漢"
    path = _stored(tmp_path, f"a.txt{compression}", COMPRESS[compression](text.encode()))
    for block_bytes in (64, 1000, 10**6):
        pieces = _read(open_data(path, block_bytes=block_bytes))
        assert "".join(pieces) == text
        assert (len(pieces) == 1) == (block_bytes > len(text.encode()))


def test_a_long_line_of_compressed_text_is_cut_between_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("refold.data.sequential._TEXT_CUT_BYTES", 5)
    text = "漢🙂üa" * 200
    path = _stored(tmp_path, "a.txt.gz", gzip.compress(text.encode()))
    pieces = _read(open_data(path, block_bytes=31))
    assert "".join(pieces) == text
    assert len(pieces) > 20


def test_a_shuffled_order_loses_nothing_and_is_the_same_again(tmp_path: Path):
    path = _stored(tmp_path, "a.csv", KINDS["csv"]("text"))
    source = open_data(path, block_bytes=16)  # Parts of a few documents.
    assert len(list(source.blocks[0].parts())) > 4
    for seed in (0, 1):
        order = list(source.documents(seed))
        assert sorted(order) == sorted(TEXTS)
        assert order == list(source.documents(seed))
        assert order != TEXTS
    assert list(source.documents(0)) != list(source.documents(1))


@pytest.mark.parametrize("kind", ["jsonl.gz", "json", "csv", "jsonl.zst"])
def test_a_file_far_larger_than_a_part_is_read_in_little_memory(tmp_path: Path, kind: str):
    rows = [{"text": "y" * 1000}] * 20_000
    if kind == "json":
        raw = json.dumps(rows).encode()
    elif kind == "csv":
        raw = b"text\n" + b"".join(row["text"].encode() + b"\n" for row in rows)
    else:
        lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        raw = gzip.compress(lines) if kind.endswith("gz") else pa.compress(lines, "zstd", asbytes=True)
    source = open_data(_stored(tmp_path, f"a.{kind}", raw), block_bytes=2**16)
    tracemalloc.start()
    count = sum(1 for _ in source.documents(seed=0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 2**23 < 20_000_000 / 2


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.pdf", b"%PDF-1.7\n%\xe2\xe3", r"\(got a PDF\); extract its text first, for instance with `pdftotext`"),
        ("a.txt", b"%PDF-1.7\n%\xe2\xe3", r"\(got a PDF\)"),
        ("a.docx", None, r"\(got a zip archive, as docx, .*\); unpack it, or save the document as plain text"),
        ("a.png", b"\x89PNG\r\n\x1a\n", r"\(got an image\); give text"),
        ("a.jpg", b"\xff\xd8\xff\xe0", r"\(got an image\)"),
        ("a.pkl", pickle.dumps(["a"]), r"\(got a pickle, which can run code and is never loaded\)"),
        ("a.txt", pickle.dumps(["a"], protocol=4), r"\(got a pickle"),
        ("a.gguf", b"GGUF\x03\0\0\0", r"\(got model weights\)"),
        ("a.bz2", b"BZh91AY", r"compressed in another way than \.gz and \.zst\); decompress it first"),
        ("a.txt", "text".encode("utf-16"), r"\(got text in UTF-16\); convert it .* `iconv -f UTF-16 -t UTF-8`"),
        ("a.bin", b"abc\0def", r"\(got a binary file: NUL bytes\)"),
        ("a.pdf.gz", gzip.compress(b"%PDF-1.7\n", mtime=0), r"a\.pdf\.gz: .*\(got a PDF\)"),
        ("a.gz", gzip.compress(gzip.compress(b"text", mtime=0), mtime=0), r"\(got compressed twice\)"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-20], r"a whole gzip file is required \(Comp"),
        ("a.txt.zst", pa.compress(os.urandom(999), "zstd", asbytes=True)[:-9], r"a whole zstd file is required \("),
        ("a.jsonl.gz", b"\x1f\x8b not gzip", r"a whole gzip file is required \("),
        ("a.json", b'{"data": [{"text": "a"}], "version": 1}', r"field 'text' is required \(got \['data', 'version'\]"),
        ("a.json", b'[{"body": "a", "id": 1}]', r"row 0: field 'text' is required \(got \['body', 'id'\]\); .*--field"),
        ("a.json", b"[1, 2]", r"row 0: a JSON object is required \(got int\)"),
        ("a.json", b'[{"text": "a"}, {"text": "b"', r"row 1: a JSON object is required \(got '\{\"text\": \"b\"'"),
        ("a.json", b'[{"text": "a"}, ', r"row 1: a JSON object is required \(got the end of the file\)"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', r"row 0: a comma or the end of the array is required"),
        ("a.json", b'[{"text": "a"}]\n{"text": "b"}', r"nothing is allowed behind the array"),
        ("a.json", b"[" * 100_000, r"row 0: a JSON object is required \(got one nested too deep\)"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, r"jsonl:1: a JSON object is required \(got one nested too deep\)"),
        ("a.csv", b"id,body\n1,a\n", r"a\.csv: column 'text' is required \(got \['body', 'id'\]\)"),
        ("a.csv", b"id,text\n1,a\n2\n", r"row 2: 2 fields are required \(got 1\)"),
        ("a.csv", b"text,id\na, b, and c,2\n", r"row 1: 2 fields are required \(got 4\); quote fields that hold ','"),
        ("a.csv", b"\n\nid,body\n1,a\n", r"column 'text' is required \(got \['body', 'id'\]\)"),
        ("a.csv", b'text\n"never closed', r"row 1: a row of CSV is required \(unexpected end of data\)"),
        ("a.csv", b"text\n\xe9\n", r"a\.csv: byte 5: text in UTF-8 is required \(got byte 0xe9\)"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_text_is_refused_with_its_reason(tmp_path: Path, name: str, raw: bytes | None, message: str):
    path = tmp_path / name
    if raw is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("word/document.xml", "<w:t>text</w:t>")
    else:
        path.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        _read(open_data(path))


def test_a_line_longer_than_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in ("blocks", "sequential"):
        monkeypatch.setattr(f"refold.data.{module}.LONGEST_RECORD", 1000)
    monkeypatch.setattr("refold.data.sequential.READ_BYTES", 100)
    line = json.dumps({"text": "z" * 3000}).encode()
    for name, raw in (
        ("a.jsonl", b"\n" + line),
        ("a.jsonl.gz", gzip.compress(line)),
        ("a.json", b"[" + line + b"]"),
        ("a.csv", b"text\n" + b"z" * 3000),
    ):
        with pytest.raises(DataError, match=r"must be at most 1,000 bytes long"):
            _read(open_data(_stored(tmp_path, name, raw), block_bytes=500))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe: a regular file is required \(got a pipe or a device\)"):
        open_data(tmp_path / "pipe")


def test_a_first_row_longer_than_the_head_is_recognised(tmp_path: Path):
    text = "long " * 30_000
    for raw in (json.dumps({"id": 1, "text": text}), json.dumps([{"text": text}])):
        for name in ("blob", "a.txt", "a.json"):
            assert _read(open_data(_stored(tmp_path, name, raw.encode()))) == [text]


def test_text_that_looks_like_json_without_the_field_stays_text(tmp_path: Path):
    for name, text in (("a.txt", '{"a": 1}\nprose'), ("b.py", "[1, 2]\n"), ("c.md", '{"texts": "a"}')):
        assert _read(open_data(_stored(tmp_path, name, text.encode()))) == [text]


def test_a_readme_beside_rows_is_no_corpus_and_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    _stored(tmp_path, "a.json", json.dumps(_rows()).encode())
    _stored(tmp_path, "b.csv.gz", gzip.compress(KINDS["csv"]("text")))
    _stored(tmp_path, "README.md", b"About these texts.")
    _stored(tmp_path, "LICENSE.txt", b"All rights.")
    _stored(tmp_path, "config.json", b'{"model_type": "llama"}')
    _stored(tmp_path, "paper.pdf", b"%PDF-1.4")
    _stored(tmp_path, ".hidden.txt", b"hidden")
    with caplog.at_level(logging.WARNING, "refold"):
        source = open_data(tmp_path)
    assert _read(source) == TEXTS * 2
    assert len(caplog.messages) == 1
    line = caplog.messages[0]
    assert "2 files are read (1 JSON, 1 CSV (gzip)), 4 are skipped: " in line
    for part in (
        "README.md (describes the data)",
        "LICENSE.txt (describes",
        "config.json (field 'text' is",
        "paper.pdf (",
    ):
        assert part in line, line


def test_a_readme_alone_is_text(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    _stored(tmp_path, "README.md", b"About.")
    assert _read(open_data(tmp_path)) == ["About."]
    assert not caplog.messages


def test_a_damaged_file_in_a_folder_is_an_error_and_not_skipped(tmp_path: Path):
    _stored(tmp_path, "a.jsonl", KINDS["jsonl"]("text"))
    _stored(tmp_path, "b.jsonl.gz", gzip.compress(KINDS["jsonl"]("text"))[:50])
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: a whole gzip file is required"):
        _read(open_data(tmp_path))


def test_a_folder_of_other_rows_names_their_fields(tmp_path: Path):
    _stored(tmp_path, "a.jsonl", KINDS["jsonl"]("body"))
    with pytest.raises(DataError, match=r"a\.jsonl:1: field 'text' is required \(got \['body', 'id'\]\)"):
        open_data(tmp_path)
    assert _read(open_data(tmp_path, field="body")) == TEXTS
