import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refold.data.readers import DataSource, from_documents, open_data
from refold.errors import DataError

TEXTS = [f"document {index}: äöü 漢字 {'x' * (index % 7)}" for index in range(40)]


def _jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_bytes(b"".join(json.dumps({field: text}, ensure_ascii=False).encode() + b"\n" for text in texts))
    return path


def _parquet(path: Path, columns: dict[str, list], rows: int = 7) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


def _read(source: DataSource) -> list[str]:
    return list(source.documents())


def test_a_text_file_is_one_document_whatever_its_extension(tmp_path: Path):
    for name in ("a.txt", "b.md", "c.py", "d.log", "e"):
        (tmp_path / name).write_bytes("one\r\ntwo é\n".encode())
        assert _read(open_data(tmp_path / name)) == ["one\r\ntwo é\n"]


def test_a_text_file_larger_than_a_block_comes_in_pieces_cut_at_line_ends(tmp_path: Path):
    text = "".join(f"line {index} é\n" for index in range(50))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    pieces = _read(open_data(tmp_path / "a.txt", block_bytes=64))
    assert len(pieces) > 5
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces)


@given(st.text(alphabet="aé漢🙂\n", max_size=300), st.integers(4, 50), st.integers(5, 20))
def test_pieces_always_join_to_the_text(tmp_path_factory, text: str, block_bytes: int, search: int):
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_text(text + "a", encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refold.data.blocks._TEXT_CUT_BYTES", search)
        assert "".join(_read(open_data(path, block_bytes=block_bytes))) == text + "a"


def test_jsonl_gives_a_document_per_line_at_every_block_size(tmp_path: Path):
    path = _jsonl(tmp_path / "a.jsonl", TEXTS)
    for block_bytes in (1, 10, 63, 64, 65, 500, 10**6):
        assert _read(open_data(path, block_bytes=block_bytes)) == TEXTS


def test_jsonl_without_a_last_line_end_with_blank_lines_and_a_byte_order_mark(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\u2028b"}\r\n\n  \n{"text": "c\xe2\x80\xa8d"}')
    assert _read(open_data(path)) == ["a\u2028b", "c\u2028d"]


def test_another_field_can_be_named(tmp_path: Path):
    assert _read(open_data(_jsonl(tmp_path / "a.jsonl", TEXTS, "content"), field="content")) == TEXTS
    assert _read(open_data(_parquet(tmp_path / "a.parquet", {"content": TEXTS}), field="content")) == TEXTS


def test_parquet_gives_a_document_per_row_and_a_block_per_row_group(tmp_path: Path):
    source = open_data(_parquet(tmp_path / "a.parquet", {"text": TEXTS, "n": list(range(40))}))
    assert len(source.blocks) == 6
    assert _read(source) == TEXTS


def test_folders_are_walked_in_order_for_known_extensions(tmp_path: Path):
    for name in ("b/z.txt", "b/a.md", "a.py", "skip.bin", ".hidden.txt", ".git/x.txt", "c.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"text": "c.jsonl"}' if name == "c.jsonl" else name)
    assert _read(open_data(tmp_path)) == ["a.py", "c.jsonl", "b/a.md", "b/z.txt"]


def test_several_paths_are_one_source(tmp_path: Path):
    _jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "b.txt").write_text("b")
    assert _read(open_data([tmp_path / "b.txt", str(tmp_path / "a.jsonl")])) == ["b", "a"]


def test_empty_documents_are_left_out(tmp_path: Path):
    assert _read(open_data(_jsonl(tmp_path / "a.jsonl", ["", "a", ""]))) == ["a"]
    assert _read(from_documents(["", "b"])) == ["b"]


def test_a_seed_shuffles_within_and_across_blocks_and_loses_nothing(tmp_path: Path):
    source = open_data(_jsonl(tmp_path / "a.jsonl", TEXTS), block_bytes=400)
    assert len(source.blocks) > 3
    orders = {
        (seed, epoch): list(source.documents(seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))
    }
    for key, order in orders.items():
        assert sorted(order) == sorted(TEXTS)
        assert order == list(source.documents(*key))
    assert len({tuple(order) for order in [*orders.values(), TEXTS]}) == 6
    # Documents of one block stay neighbours, so that a block is read once.
    first_block = set(source.blocks[0].documents())
    places = [place for place, text in enumerate(orders[0, 0]) if text in first_block]
    assert places == list(range(places[0], places[0] + len(first_block)))


def test_the_first_document_costs_one_block_of_memory(tmp_path: Path):
    path = _jsonl(tmp_path / "a.jsonl", ["y" * 1000] * 8000)
    source = open_data(path, block_bytes=2**18)
    tracemalloc.start()
    next(source.documents(seed=0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**21 < path.stat().st_size / 3


def test_identity_follows_content(tmp_path: Path):
    path = _jsonl(tmp_path / "a.jsonl", TEXTS)
    before = open_data(path).identity
    assert open_data(path).identity == before
    assert open_data(path, field="other").identity != before
    os.utime(path, (1, 1))
    assert open_data(path).identity != before
    assert from_documents(["ab", "c"]).identity != from_documents(["a", "bc"]).identity
    assert from_documents(["ab", "c"]).identity == from_documents(iter(["ab", "c"])).identity


def test_text_that_is_not_utf8_names_file_and_byte(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good line\n" * 20 + b"bad \xff\n" + b"good line\n" * 20)
    for block_bytes in (64, 10**6):
        with pytest.raises(DataError, match=r"a\.txt: byte 204: text in UTF-8 is required \(got byte 0xff\)"):
            _read(open_data(path, block_bytes=block_bytes))


def test_jsonl_that_is_not_utf8_names_file_and_byte(tmp_path: Path):
    path = _jsonl(tmp_path / "a.jsonl", TEXTS)
    offset = path.stat().st_size + 10
    path.write_bytes(path.read_bytes() + b'{"text": "\xe9"}\n')
    for block_bytes in (64, 10**6):
        with pytest.raises(DataError, match=rf"a\.jsonl: byte {offset}: text in UTF-8 is required \(got byte 0xe9\)"):
            _read(open_data(path, block_bytes=block_bytes))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"a\.jsonl:41: a JSON object is required \(got '\{broken'"),
        ("[1]", r"a\.jsonl:41: a JSON object is required \(got list\)"),
        ('{"texts": "a"}', r"a\.jsonl:41: field 'text' is required \(got \['texts'\]\); did you mean 'texts'"),
        ('{"text": 3}', r"a\.jsonl:41: field 'text' must be a string \(got int\)"),
        ('{"text": "\\ud800"}', r"a\.jsonl:41: field 'text' must be Unicode text \(got a lone surrogate\)"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str, message: str):
    path = _jsonl(tmp_path / "a.jsonl", TEXTS)
    with path.open("a") as file:
        file.write(line + "\n")
    for block_bytes in (64, 10**6):
        with pytest.raises(DataError, match=message):
            _read(open_data(path, block_bytes=block_bytes))


def test_bad_parquet_is_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"a\.parquet: a readable parquet file is required"):
        open_data(path)
    _parquet(path, {"texts": TEXTS})
    with pytest.raises(DataError, match=r"column 'text' is required \(got \['texts'\]\); did you mean 'texts'"):
        open_data(path)
    _parquet(path, {"text": [1, 2]})
    with pytest.raises(DataError, match=r"column 'text' must hold strings \(got int64\)"):
        open_data(path)
    _parquet(path, {"text": ["a", "b", None]}, rows=2)
    with pytest.raises(DataError, match=r"row group 1, row 0: column 'text' must be a string \(got null\)"):
        _read(open_data(path))
    bad = pa.Array.from_buffers(pa.string(), 1, list(pa.array([b"\xff\xfe"]).buffers()))
    _parquet(path, {"text": bad})
    with pytest.raises(DataError, match=r"row group 0: column 'text' must be UTF-8 text"):
        _read(open_data(path))
    _parquet(path, {"text": ["some text " * 50] * 200})
    raw = path.read_bytes()
    source = open_data(path)
    path.write_bytes(raw[: len(raw) // 4])
    with pytest.raises(DataError, match=r"row group 0: a readable parquet file is required"):
        _read(source)


def test_missing_and_empty_data_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere\.txt: an existing file or folder is required"):
        open_data(tmp_path / "nowhere.txt")
    with pytest.raises(
        DataError, match=r"files ending in \.txt, .*\.parquet are required, or these with \.gz or \.zst \(got none\)"
    ):
        open_data(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"at least one document is required \(got none in .*empty\.txt\)"):
        open_data(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="got none in an empty list of paths"):
        open_data([])
    with pytest.raises(DataError, match=r"one document that is not empty is required \(got 2 in documents in memory\)"):
        from_documents(["", ""])


def test_a_file_that_disappears_is_named(tmp_path: Path):
    path = _jsonl(tmp_path / "a.jsonl", TEXTS)
    source = open_data(path)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: a readable file is required \(No such file"):
        _read(source)
