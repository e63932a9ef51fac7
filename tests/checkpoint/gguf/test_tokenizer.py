import itertools
import json
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig

from refold.checkpoint.gguf.split_patterns import SPLITS
from refold.checkpoint.gguf.tokenizer import find_merges, make_tokenizer_files
from refold.errors import SourceError

CONFIG = {"max_position_embeddings": 64, "bos_token_id": 1, "pad_token_id": None}
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "ba", "▁a", "  "]
SPM: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": tuple(PIECES),
    "tokenizer.ggml.scores": tuple(0.0 if len(piece) > 5 else -float(number) for number, piece in enumerate(PIECES)),
    "tokenizer.ggml.token_type": (2, 3, 3, *[6] * 256, *[1] * 6, 4),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}
BYTES = [*map(chr, range(33, 127)), "Ġ", "Ċ", "12", "123", "<end>"]
BPE: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": tuple(BYTES),
    "tokenizer.ggml.token_type": (*[1] * (len(BYTES) - 1), 3),
    "tokenizer.ggml.merges": ("1 2", "12 3"),
    "tokenizer.ggml.eos_token_id": len(BYTES) - 1,
}


def made(metadata: dict[str, Any]) -> dict[str, str]:
    return make_tokenizer_files("m.gguf", metadata, CONFIG)


def tokens(metadata: dict[str, Any], text: str) -> list[str]:
    return Tokenizer.from_str(made(metadata)["tokenizer.json"]).encode(text).tokens


def test_sentence_pieces_are_joined_by_score() -> None:
    assert tokens(SPM, "aba b") == ["<s>", "▁", "ab", "a", "▁", "b"]
    better = {**SPM, "tokenizer.ggml.scores": tuple(-score for score in SPM["tokenizer.ggml.scores"])}
    assert tokens(better, "aba b") == ["<s>", "▁a", "ba", "▁", "b"]


def test_unknown_characters_become_bytes() -> None:
    assert tokens(SPM, "é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]


def test_tokens_of_the_user_are_found_whole() -> None:
    # Two spaces are one token by their own right; the rest gets the space at its beginning.
    assert tokens(SPM, "a  a") == ["<s>", "▁a", "  ", "▁a"]
    assert tokens({**SPM, "tokenizer.ggml.add_space_prefix": False}, "a  a") == ["<s>", "a", "  ", "a"]


def test_pieces_decode_to_the_text() -> None:
    for extra in ({}, {"tokenizer.ggml.add_space_prefix": False}):
        found = Tokenizer.from_str(made({**SPM, **extra})["tokenizer.json"])
        assert found.decode(found.encode("ab éa b").ids) == "ab éa b"


@pytest.mark.parametrize(
    ("pre", "wanted"),
    [
        ("gpt-2", ["123", "4"]),
        ("smollm", ["1", "2", "3", "4"]),
        ("llama-bpe", ["123", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
    ],
)
def test_text_is_split_as_the_file_says(pre: str, wanted: list[str]) -> None:
    assert tokens({**BPE, "tokenizer.ggml.pre": pre}, "1234") == wanted


@pytest.mark.parametrize("pre", SPLITS)
def test_every_split_keeps_all_characters(pre: str) -> None:
    text = "It's 3.5 km,\n\n  not  4000!! HTMLPage über\tMünchen's ¿qué? \r\n x"
    split = Tokenizer.from_str(made({**BPE, "tokenizer.ggml.pre": pre})["tokenizer.json"]).pre_tokenizer
    assert split is not None
    spans = [span for _, span in split.pre_tokenize_str(text)]
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))


def test_beginnings_and_ends_are_added_as_the_file_says() -> None:
    assert tokens({**SPM, "tokenizer.ggml.add_bos_token": False}, "a") == ["▁a"]
    assert tokens({**SPM, "tokenizer.ggml.add_eos_token": True}, "a") == ["<s>", "▁a", "</s>"]
    assert tokens({**BPE, "tokenizer.ggml.add_eos_token": True}, "a") == ["a", "<end>"]
    begun = {**BPE, "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": len(BYTES) - 1}
    assert tokens(begun, "a") == ["<end>", "a"]


def test_transformers_loads_the_files(tmp_path: Any) -> None:
    files = made({**SPM, "tokenizer.chat_template": "{{ 'x' }}", "tokenizer.chat_template.tool_use": "{{ 'y' }}"})
    LlamaConfig().save_pretrained(tmp_path)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found("aba b")["input_ids"] == [1, *(PIECES.index(piece) for piece in ("▁", "ab", "a", "▁", "b"))]
    assert (found.bos_token, found.eos_token, found.unk_token) == ("<s>", "</s>", "<unk>")
    assert len(found) == len(PIECES)
    assert found.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "x"
    assert (
        found.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, chat_template="tool_use") == "y"
    )


def test_several_ends_are_written() -> None:
    ends = {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.eom_token_id": 2**32 - 1}
    assert json.loads(made({**BPE, **ends})["generation_config.json"]) == {
        "bos_token_id": 1,
        "eos_token_id": [len(BYTES) - 1, 3],
    }


def test_a_template_cannot_leave_its_folder() -> None:
    files = made({**BPE, "tokenizer.chat_template.../../x": "{{ 'y' }}"})
    assert set(files) == {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_file_without_a_tokenizer_gives_none() -> None:
    assert set(made({})) == {"generation_config.json"}


def test_merges_are_ordered_by_the_score_of_the_joined_piece() -> None:
    pieces = {"a": (0.0, 0), "b": (0.0, 1), "ab": (-2.0, 2), "aba": (-1.0, 3), "ba": (-3.0, 4)}
    assert find_merges(pieces) == [("a", "ba"), ("ab", "a"), ("a", "b"), ("b", "a")]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({**BPE, "tokenizer.ggml.model": "t5"}, r"tokenizer.ggml.model: must be one of gpt2, llama \(got 't5'\)"),
    "split": ({**BPE, "tokenizer.ggml.pre": "qwen9"}, r"tokenizer.ggml.pre: must be one of .*\(got 'qwen9'\).*qwen2"),
    "split type": ({**BPE, "tokenizer.ggml.pre": 3}, r"tokenizer.ggml.pre: must be one of"),
    "tokens": ({**BPE, "tokenizer.ggml.tokens": (1, 2)}, r"tokenizer.ggml.tokens: a list of texts is required"),
    "no tokens": ({**BPE, "tokenizer.ggml.tokens": ()}, r"tokenizer.ggml.tokens: a list of texts is required"),
    "types": ({**BPE, "tokenizer.ggml.token_type": (1,)}, r"token_type: a type of each of the 99 tokens is required"),
    "scores": ({**SPM, "tokenizer.ggml.scores": (1.0,)}, r"scores: a score of each of the 266 tokens is required"),
    "merges": ({**BPE, "tokenizer.ggml.merges": ("a b c",)}, r"merges: two parts with a space between .*'a b c'"),
    "no merges": ({k: v for k, v in BPE.items() if "merges" not in k}, r"merges: a list of texts is required"),
    "end": ({**BPE, "tokenizer.ggml.eos_token_id": 999}, r"eos_token_id: an id below 99 is required \(got 999\)"),
    "end type": ({**BPE, "tokenizer.ggml.eos_token_id": "x"}, r"eos_token_id: an id below 99 is required \(got 'x'\)"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_wrong_vocabulary_is_named(fault: str) -> None:
    metadata, message = BAD[fault]
    with pytest.raises(SourceError, match=f"m.gguf: metadata .*{message}"):
        made(metadata)
