from typing import Any

import pytest

from refold.data.readers import from_documents
from refold.data.tokens import scored_bytes, tokenise
from refold.modeling.load import load_tokenizer


def test_with_a_start_token_all_bytes_count(make_model, sentences):
    tokenizer = load_tokenizer(make_model())
    tokenised = tokenise(from_documents(sentences), tokenizer, budget=None, seed=None)
    assert scored_bytes(tokenised, tokenizer).tolist() == [len(text.encode()) for text in sentences]


@pytest.mark.parametrize(("text", "expected"), [("a", 0), ("🙂", 3), ("€", 2), ("é!", 2)])
def test_without_one_the_first_tokens_bytes_do_not(make_model, text: str, expected: int):
    tokenizer: Any = load_tokenizer(make_model(start=False))
    tokenizer.backend_tokenizer.model.dropout = 1.0  # no merges: one token for each byte
    tokenised = tokenise(from_documents([text]), tokenizer, budget=None, seed=None)
    assert len(tokenised.tokens) == expected + 1
    assert scored_bytes(tokenised, tokenizer).tolist() == [expected]


def test_byte_tokens_of_sentencepiece_vocabularies_are_one_byte(material):
    tokenizer = load_tokenizer(material / "models" / "stories260K")
    tokenizer.bos_token = tokenizer.eos_token = None
    ids = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    names = tokenizer.convert_ids_to_tokens(ids)
    tokenised = tokenise(from_documents(["🙂"]), tokenizer, budget=None, seed=None)
    expected = 3 if names[0] == "<0xF0>" else 4
    assert scored_bytes(tokenised, tokenizer).tolist() == [expected]
