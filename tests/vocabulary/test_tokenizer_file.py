"""A cut tokenizer encodes every text, and texts of kept tokens exactly as its source does."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from refold.errors import SourceError
from refold.vocabulary.merge_paths import MergePaths
from refold.vocabulary.tokenizer_file import TokenizerFile, read_tokenizer_file
from tests.vocabulary.conftest import COMMON, KINDS, RARE, USED

WORDS = st.lists(st.sampled_from(COMMON), min_size=1, max_size=8).map(" ".join)
ANY_TEXT = st.one_of(st.text(max_size=30), WORDS, st.lists(st.sampled_from(RARE), max_size=4).map(" ".join))


class Cut:
    """A tokenizer and its cut to the tokens of `USED`."""

    def __init__(self, raw: dict[str, Any], closes: bool = True):
        self.file = TokenizerFile(raw, "tokenizer.json")
        self.source = Tokenizer.from_str(json.dumps(raw))
        wanted = self.file.required() | set(self.file.added.values())
        for text in USED:
            wanted |= set(self.source.encode(text).ids)
        kept = sorted(self.file.closure(wanted) if closes else wanted)
        self.numbers = {number: place for place, number in enumerate(kept)}
        self.raw = self.file.cut(self.numbers)
        self.tokenizer = Tokenizer.from_str(json.dumps(self.raw))

    def mapped(self, text: str) -> list[int | None]:
        """The source's tokens of a text in new ids; None for a dropped token."""
        return [self.numbers.get(each) for each in self.source.encode(text).ids]


@pytest.fixture(scope="module", params=KINDS)
def cut(request: pytest.FixtureRequest, make_tokenizer) -> Cut:
    return Cut(make_tokenizer(request.param))


def test_fewer_tokens_are_kept_and_all_have_their_new_ids(cut: Cut):
    assert len(cut.numbers) < len(cut.file.ids) - 50
    found = cut.tokenizer.get_vocab(with_added_tokens=True)
    assert found == {token: cut.numbers[old] for token, old in cut.file.ids.items() if old in cut.numbers}
    assert sorted(found.values()) == list(range(len(cut.numbers)))


def test_the_start_token_of_the_template_is_mapped(cut: Cut):
    assert cut.tokenizer.encode("ka").ids[0] == cut.numbers[cut.file.ids["<s>"]]
    assert cut.tokenizer.encode("ka <<never>>").tokens[-1] == "<<never>>"


@given(text=ANY_TEXT)
@settings(max_examples=60)
def test_every_text_decodes_as_in_the_source(cut: Cut, text: str):
    ids = cut.tokenizer.encode(text, add_special_tokens=False).ids
    assert cut.tokenizer.decode(ids) == cut.source.decode(cut.source.encode(text, add_special_tokens=False).ids)


@given(text=WORDS | ANY_TEXT)
@settings(max_examples=60)
def test_texts_of_kept_tokens_have_the_same_tokens(cut: Cut, text: str):
    wanted = cut.mapped(text)
    if None not in wanted:
        assert cut.tokenizer.encode(text).ids == wanted


def test_the_counted_text_has_the_same_tokens(cut: Cut):
    for text in (*USED, *COMMON):
        if None not in cut.mapped(text):
            assert cut.tokenizer.encode(text).ids == cut.mapped(text)
    assert None not in cut.mapped(USED[0])


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "characters"])
def test_without_merge_paths_the_counted_text_has_other_tokens(kind, make_tokenizer):
    # The negative control: the same test fails if tokens on merge paths are dropped.
    cut = Cut(make_tokenizer(kind), closes=False)
    assert None not in cut.mapped(USED[0])
    assert cut.tokenizer.encode(USED[0]).ids != cut.mapped(USED[0])


def test_without_byte_tokens_a_text_is_lost(make_tokenizer):
    # The negative control of the required tokens.
    raw = make_tokenizer("byte-fallback")
    file, source = TokenizerFile(raw, "x"), Tokenizer.from_str(json.dumps(raw))
    kept = file.closure({*source.encode(USED[0]).ids, file.ids["<unk>"]})
    lost = Tokenizer.from_str(json.dumps(file.cut({each: place for place, each in enumerate(sorted(kept))})))
    assert lost.decode(lost.encode("\u732b").ids) != "\u732b"


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "characters"])
def test_merges_keep_their_order(kind, make_tokenizer):
    cut = Cut(make_tokenizer(kind))
    ranks = [cut.file.raw["model"]["merges"].index(merge) for merge in cut.raw["model"]["merges"]]
    assert ranks == sorted(ranks)
    assert 0 < len(ranks) < len(cut.file.raw["model"]["merges"])


def test_merges_of_older_files_are_cut_too(make_tokenizer):
    raw = make_tokenizer("byte-level")
    new = Cut(raw)
    raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]
    old = Cut(raw)
    assert old.raw["model"]["merges"] == [" ".join(pair) for pair in new.raw["model"]["merges"]]
    assert old.tokenizer.encode(USED[0]).ids == new.tokenizer.encode(USED[0]).ids


def test_words_that_are_taken_whole_stay_whole(make_tokenizer):
    raw = make_tokenizer("byte-level")
    raw["model"]["ignore_merges"] = True
    cut = Cut(raw)
    assert cut.tokenizer.encode(USED[0]).ids == cut.mapped(USED[0])


def test_a_path_has_all_tokens_on_the_way():
    paths = MergePaths([("a", "b"), ("c", "d"), ("ab", "cd"), ("b", "c")])
    assert paths.path("abcd") == {"a", "b", "c", "d", "ab", "cd", "abcd"}
    assert paths.path("bc") == {"b", "c", "bc"}
    assert paths.path("abc") == frozenset()
    assert paths.path("a") == {"a"}


@given(text=st.text(alphabet="abc", min_size=1, max_size=14))
@settings(max_examples=80)
def test_paths_end_in_the_tokens_of_the_library(text: str):
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "a"), ("aa", "bc"), ("c", "c"), ("abc", "cc"), ("aa", "aa")]
    vocab = {token: number for number, token in enumerate(["a", "b", "c", *("".join(pair) for pair in merges)])}
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    library = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    found = MergePaths(merges).path(text)
    assert bool(found) == (library.encode(text).tokens == [text])


def test_roberta_and_padding_ids_are_mapped(make_tokenizer):
    raw = make_tokenizer("byte-level")
    ids = TokenizerFile(raw, "x").ids
    raw["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {
                "type": "RobertaProcessing",
                "sep": ["</s>", ids["</s>"]],
                "cls": ["<s>", ids["<s>"]],
                "trim_offsets": True,
            }
        ],
    }
    raw["padding"] = {"strategy": "BatchLongest", "pad_id": ids["</s>"], "pad_token": "</s>"}
    file = TokenizerFile(raw, "x")
    numbers = {ids["</s>"]: 5, ids["<s>"]: 6}
    assert {ids["</s>"], ids["<s>"]} <= file.required()
    made = file.cut(numbers)
    assert made["post_processor"]["processors"][0]["sep"] == ["</s>", 5]
    assert made["post_processor"]["processors"][0]["cls"] == ["<s>", 6]
    assert made["padding"]["pad_id"] == 5
    assert raw["post_processor"]["processors"][0]["sep"] == ["</s>", ids["</s>"]]


def test_a_slow_tokenizer_is_refused(tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"a source with tokenizer.json is required .got a slow tokenizer"):
        read_tokenizer_file(tmp_path)


def test_no_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(SourceError, match=r"a source with tokenizer.json is required .got no tokenizer"):
        read_tokenizer_file(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "WordPiece", "vocab": {}}, "type BPE or Unigram is required .got WordPiece in f"),
        (
            {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "</w>"},
            "got end_of_word_suffix '</w>' in f",
        ),
        (None, "type BPE or Unigram is required .got None"),
    ],
)
def test_other_models_are_refused_by_name(model, message):
    with pytest.raises(SourceError, match=message):
        TokenizerFile({"model": model}, "f")
