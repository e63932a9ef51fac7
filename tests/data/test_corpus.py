"""All forms of data give the same documents, and a list of data keeps its parts."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
from transformers import PreTrainedTokenizerFast

from refold.data.corpus import Data, describe_training, name_parts, open_text
from refold.data.location import Location, parse_location
from refold.data.mixture import MixedSource, Mixture
from refold.data.readers import from_documents, open_data
from refold.data.split import split
from refold.data.training_data import open_training_data
from refold.errors import DataError

TEXTS = [f"The cat number {index} said hello {'dog ' * (index % 9)}" for index in range(60)]
OTHERS = [f"One two three user {index} and so on" for index in range(200)]


class Again:
    """Texts that can be iterated any number of times."""

    def __iter__(self):
        return iter(TEXTS)


def _rows():
    yield from ({"text": text} for text in TEXTS)


MAKE: dict[str, Callable[[], Data]] = {
    "list": lambda: list(TEXTS),
    "tuple": lambda: tuple(TEXTS),
    "rows": lambda: list(_rows()),
    "generator": lambda: (text for text in TEXTS),
    "generator of rows": _rows,
    "map": lambda: map(str, TEXTS),
    "iterable": Again,
    "data frame": lambda: pandas.DataFrame({"id": range(len(TEXTS)), "text": TEXTS}),
    "series": lambda: pandas.Series(TEXTS, name="anything"),
    "categories": lambda: pandas.Series(TEXTS, dtype="category"),
    "Dataset": lambda: datasets.Dataset.from_list(list(_rows())),
    "IterableDataset": lambda: datasets.IterableDataset.from_generator(_rows),
    "from_documents": lambda: from_documents(TEXTS),
    "mixture": lambda: Mixture([(TEXTS, 1)]),
}


def _jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("name", MAKE)
def test_every_object_gives_the_same_documents_again_and_again(name: str):
    source = open_text(MAKE[name]())
    assert list(source.documents()) == TEXTS
    assert list(source.documents()) == TEXTS
    assert sorted(source.documents(seed=1)) == sorted(TEXTS)
    assert source.identity == open_text(MAKE[name]()).identity


@pytest.mark.parametrize("name", MAKE)
def test_every_object_can_be_trained_on_and_is_recognised_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str
):
    options: dict[str, Any] = {"context": 16, "seed": 3, "budget": 600, "cache_folder": tmp_path, "workers": 1}
    first = open_training_data(MAKE[name](), tokenizer, **options)
    again = open_training_data(MAKE[name](), tokenizer, **options)
    other = open_training_data([*TEXTS[:-1], "another text at the very end"], tokenizer, **options)
    assert first.identity == again.identity != other.identity
    assert first.sequence(7).input_ids.equal(again.sequence(7).input_ids)
    for data in (first, again, other):
        data.close()


def test_a_generator_is_read_once_and_no_further_than_asked(caplog: pytest.LogCaptureFixture):
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield f"text number {read}"

    with caplog.at_level(logging.WARNING, "refold"):
        source = open_text(endless(), limit=1000)
    assert 30 < read < 80
    assert len(list(source.documents())) == len(list(source.documents(seed=1))) == read
    assert caplog.messages == [f"data: the first {read} documents (0.0 MB) of a generator are read, no more"]
    caplog.clear()
    open_text(iter(TEXTS))
    assert not caplog.messages


def test_a_small_budget_of_a_stream_encodes_no_more_than_it_reads(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    read = 0

    class Counted:
        def __iter__(self):
            nonlocal read
            for text in TEXTS:
                read += 1
                yield text

    options: dict[str, Any] = {"context": 16, "seed": 0, "cache_folder": tmp_path, "workers": 1}
    data = open_training_data(Counted(), tokenizer, budget=300, **options)
    assert len(data.batch(0, 19).input_ids) == 19
    data.close()
    # Whole windows and batches are encoded ahead; the default window holds 16 million tokens.
    assert read < 300_000


def test_an_endless_generator_is_trained_on_within_the_budget(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("refold.data.spool.BLOCK_BYTES", 10_000)

    def endless():
        number = 0
        while number < 10**7:  # Ends a test that would not.
            number += 1
            yield f"the cat number {number} said hello"

    data = open_training_data(endless(), tokenizer, context=16, seed=0, budget=5000, cache_folder=tmp_path, workers=1)
    assert data.tokens_per_epoch == 5000


def test_conversations_in_a_list_are_chat_data():
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
    for data in ([talk, talk], [{"messages": talk}] * 2, iter([talk, talk])):
        assert [list(each.messages) for each in open_text(data, form="chat").documents()] == [talk, talk]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["nowhere.txt"], r"nowhere\.txt: an existing file or folder is required"),
        (["one two.txt", "three"], r"one two\.txt: an existing file or folder is required"),
        (["cat", "dog"], r"cat: an existing file or folder is required"),
        (["My Books/the first of all.txt"], r"an existing file or folder is required"),
        (["This is a sentence of words.", "data.parquet"], r"data\[1\]: texts only, or paths only.*from_documents"),
        (["A text\nof lines.", "a.jsonl"], r"data\[1\]: texts only, or paths only"),
        (["A text\nof lines.", Path("a.jsonl")], r"the path of a file is required \(got a text of 16 characters"),
        ("A text\nof lines.", r"the path of a file is required \(got a text of 16 characters\); give it in a list"),
        ("x" * 9000, r"the path of a file or folder is required \(File name too long\)"),
        ([{"text": "a"}, "b", 3], r"item 2: field 'text' must be a string \(got int\)"),
        ([{"body": "a"}], r"item 0: field 'text' is required \(got \['body'\]\)"),
        (pandas.DataFrame({"body": ["a"]}), r"data frame: column 'text' is required \(got \['body'\]\); rename yours"),
        (pandas.DataFrame({"text": ["a", None]}), r"data frame: a text in every row is required \(1 rows have none\)"),
        (pandas.Series(["a", None]), r"data frame: a text in every row is required \(1 rows have none\); drop them by"),
        (b"raw", r"an iterable of texts is required \(got bytes\)"),
        ({"text": ["a"]}, r"an iterable of texts is required \(got dict\)"),
        (iter(()), r"at least one document that is not empty is required \(got none in a generator\)"),
        (iter([3]), r"a generator: item 0: field 'text' must be a string \(got int\)"),
        (["a.jsonl=0.5", "a.jsonl"], r"weights for all parts or for none"),
    ],
)  # fmt: skip
def test_data_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Data, message: str):
    monkeypatch.chdir(tmp_path)
    _jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(DataError, match=message):
        open_text(data)


def test_things_named_side_by_side_are_parts(tmp_path: Path):
    paths = [_jsonl(tmp_path / "a.jsonl", TEXTS), _jsonl(tmp_path / "b.jsonl", OTHERS)]
    found = open_text(paths)
    assert isinstance(found, MixedSource)
    assert found.weights is None
    assert [part.name for part in found.parts] == [str(path) for path in paths]
    assert list(found.documents()) == TEXTS + OTHERS
    assert (found.identity, found.name) == (open_data(paths).identity, open_data(paths).name)
    assert not isinstance(open_text(paths[:1]), MixedSource)
    assert not isinstance(open_text(tmp_path), MixedSource)
    assert not isinstance(open_text([paths[0]] * 17), MixedSource)


def test_weights_are_kept_and_change_the_identity(tmp_path: Path):
    paths = [_jsonl(tmp_path / "a.jsonl", TEXTS), _jsonl(tmp_path / "b.jsonl", OTHERS)]
    found = open_text([f"{paths[0]}=3", f"{paths[1]}=1"])
    assert isinstance(found, MixedSource)
    assert found.weights == (3.0, 1.0)
    assert found.name == f"75% {paths[0]}, 25% {paths[1]}"
    same, other = (open_text(Mixture([(paths[0], a), (paths[1], b)])) for a, b in ((0.75, 0.25), (1, 1)))
    assert found.identity == same.identity != other.identity


def test_a_mixture_keeps_its_weights_when_it_is_split_and_each_part_is_held_out(tmp_path: Path):
    train, held_out = split(open_text(Mixture([(TEXTS, 3), (OTHERS, 1)])), every=5)
    assert isinstance(train, MixedSource)
    assert isinstance(held_out, MixedSource)
    assert (train.weights, held_out.weights) == ((3.0, 1.0), None)
    for number, texts in enumerate((TEXTS, OTHERS)):
        sides = [list(side.parts[number].documents()) for side in (train, held_out)]
        assert all(sides)
        assert sorted(sides[0] + sides[1]) == sorted(texts)


def test_the_parts_of_several_files_are_held_out_as_the_whole_is(tmp_path: Path):
    paths = [_jsonl(tmp_path / "a.jsonl", TEXTS), _jsonl(tmp_path / "b.jsonl", OTHERS)]
    train, held_out = split(open_text(paths), every=5)
    plain = split(open_data(paths), every=5)
    assert (train.identity, held_out.identity) == (plain[0].identity, plain[1].identity)
    assert isinstance(held_out, MixedSource)
    assert [text for part in held_out.parts for text in part.documents()] == list(plain[1].documents())


def test_one_kind_of_text_has_a_line_with_its_price(tmp_path: Path):
    path = _jsonl(tmp_path / "a.jsonl", TEXTS)
    for data in (path, [str(path)], f"{path}=0.5", TEXTS, iter(TEXTS), open_data(path)):
        (line,) = describe_training(data)
        assert "on stories, which it did not read, from 0.17 to 0.13 alone" in line
        assert "\n" not in line
    for data in ([path, path], [f"{path}=1", f"{path}=2"], Mixture([(TEXTS, 1), (OTHERS, 1)]), open_text([path, path])):
        assert describe_training(data) == ()
    assert describe_training(path, "chat") == ()


def test_parts_have_the_names_given(tmp_path: Path):
    paths = [_jsonl(tmp_path / f"{name}.jsonl", TEXTS) for name in "abc"]
    mixed = open_text([f"{paths[0]}?name=books", str(paths[1]), paths[2]])
    assert isinstance(mixed, MixedSource)
    assert [part.name for part in mixed.parts] == ["books", str(paths[1]), str(paths[2])]
    assert mixed.name == f"books, {paths[1]}, {paths[2]}"
    assert mixed.identity == open_text(paths).identity
    weighted = open_text([f"{paths[0]}?name=books=3", f"{paths[1]}?name=docs=1"])
    assert weighted.name == "75% books, 25% docs"
    assert open_text(f"{paths[0]}?name=books").name == "books"
    shares = {"books": 0.75, "docs": 0.25}
    assert name_parts([f"{paths[0]}?name=books=3", f"{paths[1]}?name=docs=1"]) == shares
    assert name_parts(weighted) == shares
    assert name_parts([f"{paths[0]}?name=books", paths[1]]) == {"books": None, str(paths[1]): None}
    assert name_parts(mixed) == {"books": None, str(paths[1]): None, str(paths[2]): None}
    assert name_parts(iter(TEXTS)) == {"the data given": None}


def test_a_location_takes_the_field_asked_for_unless_it_names_its_own(tmp_path: Path):
    path = _jsonl(tmp_path / "a.jsonl", TEXTS, "body")
    assert parse_location(f"{path}=0.5", "body") == Location(path, "body", 0.5)
    assert parse_location(f"{path}?field=own", "body").field == "own"
    assert list(open_text([parse_location(str(path), "body")]).documents()) == TEXTS
