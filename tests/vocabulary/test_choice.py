"""The choice of kept tokens: frequent ones, those that configs name, and enough for a multiple."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from refold.errors import DataError, FolderError, RecipeError
from refold.recipe.load import load_recipe
from refold.recipe.vocabulary import VocabularyTrim
from refold.sources.source_model import read_source_model
from refold.vocabulary.choice import choose_tokens, trimmed_bytes
from refold.vocabulary.counting import count_tokens
from refold.vocabulary.tokenizer_file import read_tokenizer_file
from tests.vocabulary.conftest import RARE, USED


@pytest.fixture(scope="module")
def source(make_tokens) -> Path:
    return make_tokens()


@pytest.fixture(scope="module")
def counts(source):
    return count_tokens(source, USED)


def choose(source: Path, counts=None, **keys):
    return choose_tokens(read_source_model(source), VocabularyTrim(**keys), counts)


def test_kept_tokens_are_those_of_the_text_and_the_required_ones(source, counts):
    kept = set(choose(source, counts, multiple=1).ids.tolist())
    file = read_tokenizer_file(source)
    assert set(np.flatnonzero(counts).tolist()) <= kept
    assert kept == file.closure({*np.flatnonzero(counts).tolist(), *file.required(), *file.added.values()})
    assert len(kept) < len(file.ids) - 50


def test_a_higher_least_keeps_fewer(source, counts):
    sizes = [choose(source, counts, least=least, multiple=1).size for least in (1, 5, 12)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_the_multiple_is_filled_by_the_most_frequent(source, counts):
    few, more = choose(source, counts, least=12, multiple=1), choose(source, counts, least=12, multiple=32)
    assert more.size % 32 == 0
    assert few.size < more.size < few.size + 32
    added = set(more.ids.tolist()) - set(few.ids.tolist())
    assert set(few.ids.tolist()) < set(more.ids.tolist())
    left_out = set(np.flatnonzero(counts).tolist()) - set(more.ids.tolist())
    # A token may come with rarer ones on its path; the most frequent of all is among those that come.
    assert max(counts[each] for each in added) >= max(counts[each] for each in left_out)


def test_the_multiple_is_filled_whole_however_long_the_paths(source, counts):
    file = read_tokenizer_file(source)
    for multiple in (7, 64, 100, 10_000):
        kept = choose(source, counts, least=12, multiple=multiple)
        assert kept.size == min(kept.source_size, -(-kept.size // multiple) * multiple)
        assert file.closure(kept.ids.tolist()) == set(kept.ids.tolist())


def test_a_rounding_beyond_the_source_keeps_every_row(source, counts):
    kept = choose(source, counts, multiple=10_000)
    assert kept.ids.tolist() == list(range(kept.source_size))


def test_tokens_that_configs_and_the_chat_template_name_are_kept(source, counts, tmp_path):
    folder = tmp_path / "named"
    shutil.copytree(source, folder)
    file = read_tokenizer_file(folder)
    plain = set(choose(source, counts, multiple=1, added="used").ids.tolist())
    # The last tokens were merged last, so they are on no other token's path.
    rare = [each for each in sorted(file.model.ids.values(), reverse=True) if each not in plain][:4]
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, rare[0]], "suppress_tokens": [rare[1]], "top_k": rare[2]})
    )
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}" + file.names[rare[3]] + "{% endfor %}"
    )
    kept = set(choose(folder, counts, multiple=1, added="used").ids.tolist())
    assert {rare[0], rare[1], rare[3]} <= kept
    assert rare[2] not in kept


def test_added_tokens_are_kept_unless_only_used_ones_are_asked_for(source, counts):
    never = read_tokenizer_file(source).added["<<never>>"]
    assert never in choose(source, counts, multiple=1).ids
    assert never not in choose(source, counts, multiple=1, added="used").ids


def test_always_keeps_tokens_by_name_and_id_with_their_paths(source, counts):
    file = read_tokenizer_file(source)
    long = max(
        (each for each in file.names if not counts[each] and each not in file.added.values()),
        key=lambda each: len(file.names[each]),
    )
    other = next(each for each in file.names if not counts[each] and each > 300 and each != long)
    kept = set(choose(source, counts, multiple=1, always=(file.names[long], other)).ids.tolist())
    assert {long, other} <= kept
    assert file.closure({long}) <= kept


@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_a_list_of_tokens_is_kept(suffix, source, tmp_path):
    file = read_tokenizer_file(source)
    wanted = [file.names[each] for each in (400, 450)]
    path = tmp_path / f"tokens{suffix}"
    path.write_text("\n".join([*wanted, ""]) if suffix == ".txt" else json.dumps([wanted[0], 450]), encoding="utf-8")
    kept = choose(source, keep=str(path), multiple=1)
    assert set(kept.ids.tolist()) == file.closure({400, 450, *file.required(), *file.added.values(), 0, 1, 2})


def test_the_tokens_of_another_model_are_kept_again(source, counts, tmp_path):
    first = choose(source, counts)
    first.write(tmp_path)
    assert choose(source, keep=str(tmp_path / "kept_tokens.json")).ids.tolist() == first.ids.tolist()


def test_bytes_count_a_tied_head_once(source, make_tokens):
    model = read_source_model(source)
    assert trimmed_bytes(model, 100) == 2 * 100 * 32 * 4
    tied = read_source_model(make_tokens(variant="gemma"))
    assert tied.arch.tied_head
    assert trimmed_bytes(tied, 100) == 100 * tied.arch.hidden_size * 4


def test_a_text_that_uses_nothing_is_refused(source, counts):
    with pytest.raises(
        DataError, match=r"vocabulary.least: a token that the text has at least 100,000 times is required"
    ):
        choose(source, counts, least=100_000)


def test_no_counts_are_refused(source):
    with pytest.raises(RecipeError, match=r"vocabulary.keep: calibration text is required for `used`"):
        choose(source)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("Ġzzzz", r"vocabulary.always\[0\]: a token of .*tokenizer.json is required .got 'Ġzzzz'"),
        (10**6, r"vocabulary.always\[0\]: token 1000000 is out of range"),
    ],
)
def test_a_token_that_does_not_exist_is_refused(token, message, source, counts):
    with pytest.raises(RecipeError, match=message):
        choose(source, counts, always=(token,))


def test_the_mark_of_a_space_is_suggested(source, counts):
    file = read_tokenizer_file(source)
    token = next(each for each in file.ids if each.startswith("Ġ") and each[1:] not in file.ids)
    with pytest.raises(RecipeError, match=f"did you mean '{token}'"):
        choose(source, counts, always=(f" {token[1:]}",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "`used` or the path of a token list is required"),
        ("uesd", None, "did you mean 'used'"),
        ("a.txt", "nothere", "a.txt:1: a token of .* is required .got 'nothere'"),
        ("a.json", "{", "a.json: JSON is required"),
        ("a.json", "3", "a.json: a list of tokens or ids is required .got 3"),
        ("a.json", '[true]', "a.json: a list of tokens or ids is required"),
        ("a.json", '{"format": 1, "source_size": 5, "ids": [1]}', "kept tokens of a vocabulary of .* .got one of 5"),
    ],
)  # fmt: skip
def test_a_broken_list_is_refused(name, content, message, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=message):
        choose(source, keep=name)


def test_a_damaged_list_of_kept_tokens_is_refused(source, tmp_path):
    path = tmp_path / "kept_tokens.json"
    path.write_text('{"format": 1, "source_size": 9, "ids": [3, 2]}')
    with pytest.raises(FolderError, match=r"a list of kept tokens of format 1 is required"):
        choose(source, keep=str(path))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"least": 0}, "vocabulary.least"),
        ({"added": "some"}, "vocabulary.added"),
        ({"always": ["a", "a"]}, "each entry must occur once"),
        ({"always": [-1]}, "vocabulary.always"),
        ({"keep": ""}, "vocabulary.keep"),
    ],
)
def test_wrong_keys_are_refused(section, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe({"vocabulary": section})


def test_rare_words_are_not_kept(source, counts):
    kept = choose(source, counts, multiple=1)
    rare = count_tokens(source, [" ".join(RARE)])
    assert set(np.flatnonzero(rare).tolist()) - set(kept.ids.tolist())
