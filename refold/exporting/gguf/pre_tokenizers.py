"""Names that llama.cpp has for pre-tokenizers of byte-level BPE, recognised by their steps in `tokenizer.json`."""

from collections.abc import Mapping
from typing import Any

from refold.checkpoint.gguf.split_patterns import DIGIT, GPT2
from refold.errors import ExportError

Steps = tuple[str, ...]
"""A pre-tokenizer: one text for each step."""

GPT2_STEP = "byte-level, GPT-2's pattern"
BYTES_STEP = "byte-level"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = _WORDS + r"\p{N}{1,3}" + _REST
QWEN2_PATTERN = _WORDS + r"\p{N}" + _REST
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

NAMES: Mapping[tuple[Steps, bool], str] = {
    ((GPT2_STEP,), False): "gpt-2",
    # The same splits as the reader of GGUF sources describes them.
    ((f"isolated {GPT2}", BYTES_STEP), False): "gpt-2",
    ((f"isolated {DIGIT}", f"isolated {GPT2}", BYTES_STEP), False): "smollm",
    (("digits one by one", GPT2_STEP), False): "smollm",
    ((f"isolated {LLAMA3_PATTERN}", BYTES_STEP), False): "smaug-bpe",
    ((f"isolated {LLAMA3_PATTERN}", BYTES_STEP), True): "llama-bpe",
    ((f"isolated {QWEN2_PATTERN}", BYTES_STEP), False): "qwen2",
    ((f"isolated {TEKKEN_PATTERN}", BYTES_STEP), True): "tekken",
}
"""Value of `tokenizer.ggml.pre` by steps and `ignore_merges`: words of the vocabulary are then taken whole."""


def name_pre_tokenizer(pre: Mapping[str, Any] | None, ignores_merges: bool, where: str) -> str:
    """Returns llama.cpp's name of a pre-tokenizer.

    Args:
        pre: `pre_tokenizer` of a `tokenizer.json`.
        ignores_merges: `ignore_merges` of its model.
        where: The file, for the message.

    Raises:
        ExportError: llama.cpp has no such pre-tokenizer, so that it would split texts in another way.
    """
    steps = describe_steps(pre)
    found = NAMES.get((steps, ignores_merges))
    if found is None:
        how = " and ignore_merges" if ignores_merges else ""
        raise ExportError(
            f"{where}: a pre-tokenizer that llama.cpp has is required ({', '.join(dict.fromkeys(NAMES.values()))}; got "
            f"{', '.join(steps)[:200] or 'none'}{how}); export with another tokenizer, or remove tokenizer.json from a "
            f"copy of the folder to write a file without a vocabulary"
        )
    return found


def describe_steps(pre: Mapping[str, Any] | None) -> Steps:
    """Returns the steps of a pre-tokenizer in words; equal steps split equally."""
    if pre is None:
        return ()
    kind = pre.get("type")
    if kind == "Sequence":
        return tuple(step for each in pre.get("pretokenizers", ()) for step in describe_steps(each))
    if kind == "ByteLevel":
        prefix = "prefix space, " if pre.get("add_prefix_space") else ""
        return (prefix + (GPT2_STEP if pre.get("use_regex", True) else BYTES_STEP),)
    if kind == "Digits":
        return ("digits one by one" if pre.get("individual_digits") else "digits together",)
    if kind == "Split":
        pattern = pre.get("pattern", {})
        text = pattern.get("Regex") or f"text {pattern.get('String')!r}"
        inverted = "inverted " if pre.get("invert") else ""
        return (f"{inverted}{str(pre.get('behavior')).lower()} {text}",)
    return (str(kind),)
