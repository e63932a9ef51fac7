"""Tokenizers of each kind that can be cut, trained on made words."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPACE = "\u2581"
SPECIAL = ["<pad>", "<s>", "</s>"]
KINDS = ("byte-level", "byte-fallback", "characters", "unigram")


def made_words(count: int, seed: int) -> list[str]:
    """Words of one to four syllables, so that their tokens have long merge paths."""
    numbers = random.Random(seed)
    syllables = [a + b for a in "bdfklmnprst" for b in ("a", "e", "i", "o", "ur", "en", "ä")]
    return ["".join(numbers.choice(syllables) for _ in range(numbers.randint(1, 4))) for _ in range(count)]


COMMON, RARE = made_words(60, seed=1), made_words(60, seed=2)


def text_of(words: list[str], length: int, seed: int) -> str:
    numbers = random.Random(seed)
    return " ".join(numbers.choice(words) for _ in range(length))


CORPUS = [text_of(COMMON + RARE, 3000, seed=3), "12 + 34 = 46.\n\n\tEnd: ä ö ü.\n"]
USED = [text_of(COMMON, 600, seed=4)]


def _train(kind: str) -> Tokenizer:
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(vocab_size=420, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>")
    else:
        tokenizer = Tokenizer(models.BPE())
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "byte-level" else []
        special = SPECIAL if kind == "byte-level" else ["<unk>", *SPECIAL]
        trainer = trainers.BpeTrainer(vocab_size=560, special_tokens=special, initial_alphabet=alphabet)
    if kind == "byte-level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _with_bytes(raw: dict[str, Any]) -> dict[str, Any]:
    """Adds the 256 bytes behind the special tokens, as SentencePiece does."""
    model, pieces = raw["model"], [f"<0x{value:02X}>" for value in range(256)]
    if model["type"] == "Unigram":
        model["vocab"] = [*model["vocab"][:4], *([piece, -20.0] for piece in pieces), *model["vocab"][4:]]
    else:
        names = sorted(model["vocab"], key=model["vocab"].get)
        model["vocab"] = {token: number for number, token in enumerate([*names[:4], *pieces, *names[4:]])}
        model |= {"unk_token": "<unk>", "fuse_unk": True}
    return {**raw, "model": {**model, "byte_fallback": True}}


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str], dict[str, Any]]:
    """Makes the content of a `tokenizer.json`, with a start token by its post-processor and an added token."""
    made: dict[str, str] = {}

    def make(kind: str) -> dict[str, Any]:
        if kind not in made:
            raw = json.loads(_train(kind).to_str())
            raw = _with_bytes(raw) if kind in ("byte-fallback", "unigram") else raw
            if kind == "characters":
                raw["model"]["unk_token"] = "<unk>"
            tokenizer = Tokenizer.from_str(json.dumps(raw))
            tokenizer.add_tokens([AddedToken("<<never>>", normalized=False)])
            start = tokenizer.token_to_id("<s>")
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]
            )
            made[kind] = tokenizer.to_str()
        return json.loads(made[kind])

    return make


@pytest.fixture(scope="session")
def make_tokens(
    make_source: Callable[..., Path], make_tokenizer: Callable[[str], dict[str, Any]], tmp_path_factory
) -> Callable[..., Path]:
    """Makes a source of 4 layers with a tokenizer of a kind; the embedding has 7 rows without a token."""
    from transformers import PreTrainedTokenizerFast

    def make(kind: str = "byte-level", variant: str = "llama", **fields: Any) -> Path:
        folder = tmp_path_factory.mktemp("tokens")
        tokenizer = Tokenizer.from_str(json.dumps(make_tokenizer(kind)))
        named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        ids = {f"{name}_id": tokenizer.token_to_id(token) for name, token in named.items()}
        size = tokenizer.get_vocab_size() + 7
        for file in make_source(variant, vocab_size=size, **ids, **fields).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
        return folder

    return make
