import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refold.data.chat import read_conversation
from refold.data.readers import open_data
from refold.data.split import split
from refold.errors import DataError

TALKS = [
    [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": f"{number} é"}]
    for number in range(300)
]


def _jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_and_parquet_give_the_same_conversations(tmp_path: Path):
    _jsonl(tmp_path / "a.jsonl", [{"messages": talk} for talk in TALKS])
    # One row with a key that the others lack.
    talks = [*TALKS[:-1], [TALKS[-1][0], {**TALKS[-1][1], "name": "bot"}]]
    pq.write_table(pa.table({"messages": talks}), tmp_path / "a.parquet", row_group_size=70)
    lines = [each.messages for each in open_data(tmp_path / "a.jsonl", form="chat", block_bytes=500).documents()]
    rows = [each.messages for each in open_data(tmp_path / "a.parquet", form="chat").documents()]
    assert lines == [tuple(talk) for talk in TALKS]
    assert rows == [tuple(talk) for talk in talks]


def test_a_field_can_be_named_and_forms_differ_in_identity(tmp_path: Path):
    path = _jsonl(tmp_path / "a.jsonl", [{"turns": TALKS[0]}])
    source = open_data(path, field="turns", form="chat")
    assert [each.messages for each in source.documents()] == [tuple(TALKS[0])]
    assert source.identity != open_data(path, field="turns").identity


def test_a_split_takes_whole_conversations(tmp_path: Path):
    path = _jsonl(tmp_path / "a.jsonl", [{"messages": talk} for talk in TALKS])
    sides = [list(side.documents()) for side in split(open_data(path, form="chat"))]
    assert all(sides)
    assert sorted(str(each.messages) for side in sides for each in side) == sorted(str(tuple(talk)) for talk in TALKS)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", r"a list of messages with role and content is required \(got str\)"),
        (None, r"a list of messages .* is required \(got null\)"),
        ([], r"a list of messages .* is required \(got an empty list\)"),
        (["hello"], r"message 0: an object with role and content is required \(got str\)"),
        (
            [{"role": "asistant", "content": "a"}],
            r"message 0: a role of .* is required \(got 'asistant'\); did you mean",
        ),
        ([{"from": "gpt", "value": "a"}], r"message 0: a role of .* is required \(got None\)"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant"}],
            r"message 1: content must be a string \(got null\)",
        ),
        ([{"role": "assistant", "content": ["a"]}], r"message 0: content must be a string \(got list\)"),
        ([{"role": "assistant", "content": "\ud800"}], r"message 0: content must be Unicode text"),
        ([{"role": "user", "content": "a"}], r"a message of the assistant is required \(got roles \['user'\]\)"),
    ],
)
def test_what_is_no_conversation_is_named(value: Any, message: str):
    with pytest.raises(DataError, match=rf"^x\.jsonl:2(, |: ){message}"):
        read_conversation(value, "x.jsonl:2")


def test_a_call_of_tools_needs_no_content():
    talk = [{"role": "assistant", "tool_calls": [{"name": "f"}], "content": None}]
    assert read_conversation(talk, "x").messages == ({"role": "assistant", "tool_calls": [{"name": "f"}]},)


def test_rows_without_messages_are_named_with_their_line(tmp_path: Path):
    path = _jsonl(tmp_path / "a.jsonl", [{"messages": TALKS[0]}, {"message": TALKS[0]}])
    with pytest.raises(
        DataError, match=r"a\.jsonl:2: field 'messages' is required \(got \['message'\]\); did you mean"
    ):
        list(open_data(path, form="chat").documents())
    path = _jsonl(tmp_path / "b.jsonl", [{"messages": TALKS[0]}, {"messages": [{"role": "bot", "content": ""}]}])
    with pytest.raises(DataError, match=r"b\.jsonl:2: field 'messages', message 0: a role of"):
        list(open_data(path, form="chat").documents())


def test_parquet_without_lists_and_plain_text_are_refused(tmp_path: Path):
    pq.write_table(pa.table({"messages": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'messages' must hold lists of messages \(got string\)"):
        open_data(tmp_path / "a.parquet", form="chat")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(
        DataError, match=r"a\.txt: JSON lines or parquet is required for conversations \(got plain text\)"
    ):
        open_data(tmp_path / "a.txt", form="chat")
