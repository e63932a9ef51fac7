"""Tokenizers for the tests of data."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ["The cat number é 漢.", "a dog said hello to you", "user assistant system", "<|im_start|>", "one two three"]


@pytest.fixture(scope="session")
def bytes_backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(WORDS * 10, trainer)
    return tokenizer.to_str()


@pytest.fixture
def make_tokenizer(bytes_backend: str) -> Callable[..., PreTrainedTokenizerFast]:
    def make(**fields: str) -> PreTrainedTokenizerFast:
        fields = {"bos_token": "<s>", "eos_token": "</s>", **fields}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bytes_backend), **fields)

    return make


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips waiting for the disk, because power cuts are not tested here and the files are many and small."""
    monkeypatch.setattr("os.fsync", lambda _: None)
