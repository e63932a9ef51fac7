from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SENTENCES = (
    "The sea was calm that night, and the moon lay on it.",
    "Naïve cafés — €5 a cup — are dear: 北京 has cheaper ones. 🙂",
    "def add(a, b):\n    return a + b\n",
    "A short one.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.",
)


@pytest.fixture(scope="session")
def sentences() -> tuple[str, ...]:
    return SENTENCES


@pytest.fixture(scope="session")
def make_model(make_source, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a source of 300 tokens with a byte-level tokenizer, with or without a start token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )

    def make(variant: str = "llama", start: bool = True, **fields: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        for file in make_source(variant, vocab_size=300, **fields).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        named = {"bos_token": "<s>", "eos_token": "</s>"} if start else {}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
        return folder

    return make
