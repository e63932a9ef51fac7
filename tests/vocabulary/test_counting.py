"""Counts of tokens equal those of the library, whole or within a budget."""

from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from refold.data.corpus import open_text
from refold.data.mixture import Mixture
from refold.errors import DataError, SourceError
from refold.vocabulary.counting import count_tokens, template_ids
from tests.vocabulary.conftest import CORPUS, KINDS, USED


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_library(kind, make_tokens):
    source = make_tokens(kind)
    library = Tokenizer.from_file(str(source / "tokenizer.json"))
    expected = Counter(each for text in CORPUS for each in library.encode(text, add_special_tokens=False).ids)
    expected[library.get_vocab()["<s>"]] += len(CORPUS)
    found = count_tokens(source, CORPUS)
    assert found.shape == (library.get_vocab_size() + 7,)
    assert {int(each): int(found[each]) for each in np.flatnonzero(found)} == dict(expected)


def test_a_budget_counts_that_many_tokens(make_tokens):
    source = make_tokens()
    assert count_tokens(source, CORPUS * 3, tokens=500).sum() == 500
    assert count_tokens(source, USED, tokens=10**9).sum() == count_tokens(source, USED).sum()


def test_weights_divide_the_budget(make_tokens, tmp_path):
    source = make_tokens()
    for name, letter in (("a", "\u3042"), ("b", "\u4e00")):
        (tmp_path / f"{name}.txt").write_text(letter * 4000, encoding="utf-8")
    mixed = Mixture([(tmp_path / "a.txt", 0.75), (tmp_path / "b.txt", 0.25)])
    counts = count_tokens(source, open_text(mixed), tokens=400)
    assert counts.sum() == 400
    library = Tokenizer.from_file(str(source / "tokenizer.json"))
    first = library.encode("\u3042", add_special_tokens=False).ids
    assert 0.6 * 400 < sum(int(counts[each]) for each in set(first)) < 0.9 * 400


def test_template_tokens_are_those_that_it_writes(make_tokens):
    tokenizer = AutoTokenizer.from_pretrained(make_tokens())
    assert template_ids(tokenizer) == set()
    tokenizer.chat_template = "{% for m in messages %}{{ raise_exception('no') if m['role'] == 'system' }}Q{% endfor %}{% if add_generation_prompt %}</s>{% endif %}"  # noqa: E501
    assert template_ids(tokenizer) == {*tokenizer("Q", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id}


def test_a_token_without_a_row_is_refused(make_model, make_source, tmp_path):
    source, small = make_model(), make_source("llama", vocab_size=120)
    for file in (*small.iterdir(), *source.glob("tokenizer*")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match=r"tokens below the model's 120 are required"):
        count_tokens(tmp_path, ["The sea was calm that night."])


def test_a_source_without_a_tokenizer_is_refused(make_source):
    with pytest.raises(SourceError, match=r"a tokenizer is required"):
        count_tokens(make_source("llama"), USED)
