from pathlib import Path

import pytest

from refold.data.location import HubName, Location, parse_location
from refold.errors import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", Location(Path("a.jsonl"))),
        ("a.jsonl=0.7", Location(Path("a.jsonl"), weight=0.7)),
        ("a=b/c.txt", Location(Path("a=b/c.txt"))),
        ("a=b.txt=2", Location(Path("a=b.txt"), weight=2.0)),
        ("a.jsonl=-1", Location(Path("a.jsonl"), weight=-1.0)),
        ("a.jsonl?field=body", Location(Path("a.jsonl"), "body")),
        ("a.jsonl?field=body=.5", Location(Path("a.jsonl"), "body", 0.5)),
        ("a.jsonl?name=books", Location(Path("a.jsonl"), name="books")),
        ("a.jsonl?name=books&field=body=.5", Location(Path("a.jsonl"), "body", 0.5, "books")),
        ("hf://org/name", Location(HubName("org/name", None, None, "train", False))),
        ("hf-stream://org/name=3", Location(HubName("org/name", None, None, "train", True), weight=3.0)),
        (
            "hf://org/na.me@v1.0:en-20#train[:10%]?field=body=0.25",
            Location(HubName("org/na.me", "v1.0", "en-20", "train[:10%]", False), "body", 0.25),
        ),
        ("hf://org/name#test", Location(HubName("org/name", None, None, "test", False))),
        ("hf://org/name:sample", Location(HubName("org/name", None, "sample", "train", False))),
    ],
)
def test_a_string_names_place_field_and_weight(text: str, expected: Location):
    assert parse_location(text) == expected


@pytest.mark.parametrize("name", ["a=0.7", "a=1.txt", "what?field=x", "x?"])
def test_what_exists_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("a")
    assert parse_location(name) == Location(Path(name))
    assert parse_location(f"{name}=0.3") == Location(Path(name), weight=0.3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://org/name", r"s3://org/name: a data set of the hub as hf://org/name"),
        ("hf://name", r"hf://name: a data set of the hub as hf://org/name"),
        ("hf://org/name@#x", r"a data set of the hub as hf://org/name"),
        (
            "a.jsonl?feld=x",
            r"`\?field=NAME`, .* are required behind a question mark \(got '\?feld=x'\); did you mean 'field'",
        ),
        ("a.jsonl?field=", r"`\?field=NAME`, .* are required behind a question mark \(got '\?field='\)"),
        ("a.jsonl?name=a&name=b", r"`\?name=NAME` or both joined by & are required .* \(got '\?name=a&name=b'\)"),
        ("a.jsonl=0.5=0.5", r"one weight is required \(got two\)"),
    ],
)
def test_another_spelling_is_refused(text: str, message: str):
    with pytest.raises(DataError, match=message):
        parse_location(text)
