"""How byte-level vocabularies split text into words, by llama.cpp's name of the split (`tokenizer.ggml.pre`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+@|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*@"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
TEKKEN = rf"{_WORDS.replace('@', '')}|\p{{N}}|{_MARKS}|{_REST}"
GPT4O = rf"{_WORDS.replace('@', CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_MARKS}|{_REST}"
DIGIT = r"\p{N}"
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
"""Patterns of a file that names no split: each splits the pieces of the one before."""


@dataclass(frozen=True)
class TextSplit:
    """A way to split text, and the properties of the vocabularies that use it.

    Attributes:
        patterns: Regular expressions; each splits the pieces of the one before.
        whole_words: Whether a piece that is a token is not cut again (`ignore_merges`).
        begins: Whether a text begins with the token of beginnings if the file does not say so.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False

    def describe(self) -> dict[str, Any]:
        """Returns the `pre_tokenizer` of a `tokenizer.json`."""
        split = {"type": "Split", "behavior": "Isolated", "invert": False}
        splits = [{**split, "pattern": {"Regex": pattern}} for pattern in self.patterns]
        spell = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {"type": "Sequence", "pretokenizers": [*splits, spell]}


_GPT2, _LLAMA3, _GPT4O = TextSplit((GPT2,)), TextSplit((LLAMA3,), whole_words=True, begins=True), TextSplit((GPT4O,))
_DIGITS, _QWEN2 = TextSplit((DIGIT, GPT2)), TextSplit((QWEN2,))

SPLITS: Mapping[str, TextSplit] = {
    "default": TextSplit(DEFAULT),
    **dict.fromkeys(("gpt-2", "gpt2", "mpt", "olmo", "jais", "trillion", "exaone4", "granite-docling"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), TextSplit((LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "tekken": TextSplit((TEKKEN,), whole_words=True, begins=True),
}
