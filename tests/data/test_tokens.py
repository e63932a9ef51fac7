import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from refold.data.encoder import TextEncoder, document_start_token
from refold.data.readers import from_documents, open_data
from refold.data.tokens import tokenise
from refold.errors import DataError

TEXTS = [f"The {word} number {index} é 漢." for index, word in enumerate(["cat", "dog", "bird", "fish"] * 10)]


@pytest.fixture(scope="module")
def backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


def _tokenizer(backend: str, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend), **special)


def test_documents_come_back_whole_with_their_bytes(backend: str):
    tokenizer = _tokenizer(backend, bos_token="<s>", eos_token="</s>")
    found = tokenise(from_documents(TEXTS), tokenizer, budget=None, seed=None)
    assert found.is_whole_source
    assert found.num_documents == len(TEXTS)
    assert (found.offsets[-1], found.byte_offsets[-1]) == (found.num_tokens, found.num_bytes)
    for index, text in enumerate(TEXTS):
        ids = found.document(index).tolist()
        assert ids[0] == tokenizer.bos_token_id == found.document_start
        assert tokenizer.decode(ids[1:]) == text
        assert found.byte_offsets[index + 1] - found.byte_offsets[index] == len(text.encode())


def test_the_start_token_is_bos_else_eos_else_none(backend: str):
    for special, expected in (({"bos_token": "<s>", "eos_token": "</s>"}, 0), ({"eos_token": "</s>"}, 1), ({}, None)):
        tokenizer = _tokenizer(backend, **special)
        assert document_start_token(tokenizer) == expected
        found = tokenise(from_documents(["cat"]), tokenizer, budget=None, seed=0)
        assert found.document_start == expected
        plain = tokenizer("cat", add_special_tokens=False)["input_ids"]
        assert found.tokens.tolist() == ([] if expected is None else [expected]) + plain


def test_a_tokenizers_own_special_tokens_are_not_added_twice(backend: str):
    tokenizer = _tokenizer(backend, bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    assert tokenizer("cat")["input_ids"][0] == 0
    assert tokenise(from_documents(["cat"]), tokenizer, budget=None, seed=0).tokens.tolist().count(0) == 1


def test_a_seed_orders_documents(backend: str):
    tokenizer, source = _tokenizer(backend, bos_token="<s>"), from_documents(TEXTS)
    one, again, other = (tokenise(source, tokenizer, budget=None, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.tokens, again.tokens)
    assert not np.array_equal(one.tokens, other.tokens)
    assert sorted(one.tokens) == sorted(other.tokens)


@pytest.mark.parametrize("budget", [1, 2, 17, 100, 333])
def test_a_budget_gives_the_beginning_of_the_same_stream(backend: str, budget: int):
    tokenizer, source = _tokenizer(backend, bos_token="<s>"), from_documents(TEXTS)
    whole = tokenise(source, tokenizer, budget=None, seed=3)
    part = tokenise(source, tokenizer, budget=budget, seed=3)
    assert not part.is_whole_source
    assert np.array_equal(part.tokens, whole.tokens[:budget])
    complete = part.num_documents - 1
    assert np.array_equal(part.byte_offsets[: complete + 1], whole.byte_offsets[: complete + 1])
    last = part.document(complete).tolist()[1:]
    text = str(tokenizer.decode(last))
    assert part.num_bytes - part.byte_offsets[complete] == pytest.approx(len(text.encode()), abs=2)
    assert part.num_bytes <= whole.byte_offsets[complete + 1]


def test_a_budget_beyond_the_data_gives_the_data_once(backend: str):
    tokenizer, source = _tokenizer(backend), from_documents(TEXTS)
    whole = tokenise(source, tokenizer, budget=None, seed=3)
    for budget, is_whole in ((whole.num_tokens - 1, False), (whole.num_tokens, True), (10**6, True)):
        found = tokenise(source, tokenizer, budget=budget, seed=3)
        assert found.is_whole_source is is_whole
        assert found.num_tokens == min(budget, whole.num_tokens)


def test_a_long_last_document_is_read_only_as_far_as_the_budget_goes(backend: str, monkeypatch: pytest.MonkeyPatch):
    tokenizer = _tokenizer(backend, bos_token="<s>")
    text = "The cat number 7. " * 20000
    whole = tokenise(from_documents([text]), tokenizer, budget=None, seed=0)
    lengths: list[int] = []
    original = TextEncoder._all_ids

    def counting(self, texts: list[str]):
        lengths.extend(map(len, texts))
        return original(self, texts)

    monkeypatch.setattr(TextEncoder, "_all_ids", counting)
    part = tokenise(from_documents([text]), tokenizer, budget=500, seed=0)
    assert np.array_equal(part.tokens, whole.tokens[:500])
    assert 0 < max(lengths) < len(text) / 20


def test_a_long_document_of_long_tokens_still_fills_the_budget(backend: str):
    tokenizer = _tokenizer(backend)
    tokenizer.add_tokens(["=" * 400])
    source = from_documents([("=" * 400 + " cat ") * 300])
    whole = tokenise(source, tokenizer, budget=None, seed=0)
    assert np.array_equal(tokenise(source, tokenizer, budget=200, seed=0).tokens, whole.tokens[:200])


def test_ids_take_two_bytes_where_the_vocabulary_fits_and_else_four(backend: str):
    tokenizer = _tokenizer(backend)
    assert tokenise(from_documents(["cat"]), tokenizer, budget=None, seed=0).tokens.dtype == np.uint16
    tokenizer.add_tokens([f"<extra{index}>" for index in range(2**16)])
    found = tokenise(from_documents([f"<extra{2**16 - 1}>"]), tokenizer, budget=None, seed=0)
    assert found.tokens.dtype == np.uint32
    assert found.tokens.tolist() == [len(tokenizer) - 1]


def test_progress_counts_tokens(backend: str):
    seen: list[int] = []
    found = tokenise(from_documents(TEXTS), _tokenizer(backend), budget=None, seed=0, on_progress=seen.append)
    assert seen[-1] == found.num_tokens


def test_the_cache_gives_the_same_without_reading_the_data_again(backend: str, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenizer, source = _tokenizer(backend, bos_token="<s>"), open_data(path)
    first = tokenise(source, tokenizer, budget=100, seed=0, cache_folder=tmp_path / "side")
    path.unlink()
    tokenizer(["padded", "x"], padding=False, truncation=True, max_length=1)  # leaves its traces in the tokenizer
    second = tokenise(source, _tokenizer(backend, bos_token="<s>"), budget=100, seed=0, cache_folder=tmp_path / "side")
    third = tokenise(source, tokenizer, budget=100, seed=0, cache_folder=tmp_path / "side")
    for found in (second, third):
        for name in ("tokens", "offsets", "byte_offsets"):
            assert np.array_equal(getattr(first, name), getattr(found, name))
            assert getattr(first, name).dtype == getattr(found, name).dtype
        assert (found.document_start, found.is_whole_source) == (0, False)
    assert len(list((tmp_path / "side").iterdir())) == 1


def test_the_cache_knows_every_input_apart(backend: str, tmp_path: Path):
    source = from_documents(TEXTS)
    options = [
        (source, _tokenizer(backend, bos_token="<s>"), 100, 0),
        (source, _tokenizer(backend, bos_token="<s>"), 101, 0),
        (source, _tokenizer(backend, bos_token="<s>"), 100, 1),
        (source, _tokenizer(backend, bos_token="</s>"), 100, 0),
        (from_documents(TEXTS[1:]), _tokenizer(backend, bos_token="<s>"), 100, 0),
    ]
    for documents, tokenizer, budget, seed in options:
        tokenise(documents, tokenizer, budget=budget, seed=seed, cache_folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(options)


def test_a_torn_cache_is_named(backend: str, tmp_path: Path):
    source, tokenizer = from_documents(TEXTS), _tokenizer(backend)
    tokenise(source, tokenizer, budget=100, seed=0, cache_folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"tokens-.*: a whole token cache is required .*; delete it to make it anew"):
        tokenise(source, tokenizer, budget=100, seed=0, cache_folder=tmp_path)


def test_an_unwritable_cache_is_named(backend: str, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"the token cache must be writable .*; free space or name another folder"):
        tokenise(from_documents(TEXTS), _tokenizer(backend), budget=9, seed=0, cache_folder=tmp_path / "file")


def test_nothing_to_tokenise_is_refused(backend: str, tmp_path: Path):
    with pytest.raises(DataError, match=r"a budget of at least 1 token is required \(got 0\)"):
        tokenise(from_documents(TEXTS), _tokenizer(backend), budget=0, seed=0)
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"document that is not empty is required \(got none in .*a\.jsonl\)"):
        tokenise(open_data(tmp_path / "a.jsonl"), _tokenizer(backend), budget=5, seed=0)
