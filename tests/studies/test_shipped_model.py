"""The model in the package: its size, its tokenizer, and the quality of its card."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import refold.errors
from refold.errors import FolderError
from refold.studies.shipped import HELD_OUT, copy_out, held_out_documents

FOLDER = Path(str(refold.errors.__file__)).parent / "shipped" / "stdlib-5m"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(FOLDER, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def bits_per_byte(model: LlamaForCausalLM, ids: list[int], text: str) -> float:
    with torch.no_grad():
        windows = torch.tensor([0, *ids]).unfold(0, 513, 512)
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits.float()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").item()
    return nats / math.log(2) / len(text.encode())


@pytest.fixture(scope="module")
def held_out(tokenizer) -> tuple[list[int], str]:
    """Returns the first 4,096 tokens of `email.message` or a similar module, with their text."""
    text = next(text for text in held_out_documents() if "class Message" in text)
    ids = tokenizer(text)["input_ids"][:4096]
    return ids, tokenizer.decode(ids)


def test_folder_is_small_and_whole() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.jsonl",
    }
    assert files["model.safetensors"] < 12_000_000
    assert files["training.jsonl"] < 100_000


def test_architecture_is_as_promised(model: LlamaForCausalLM) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.num_hidden_layers == 12
    assert model.config.vocab_size == 2048
    assert 4_000_000 < sum(p.numel() for p in model.parameters()) < 6_000_000
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn x\n",
        "  two leading spaces",
        "\n\n\n    if a:\n        b  =  c\r\n",
        " trailing ",
        "naïve – 漢字 🙂 \x00\x7f",
        "a<|endoftext|>b",
        "",
        "don 't , do n't .",
    ],
)
def test_tokenizer_gives_any_text_back(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_special_token(tokenizer) -> None:
    assert len(tokenizer) == 2048
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 0)
    assert tokenizer("x = 1")["input_ids"][0] != 0, "the separator is the reader's to add"


def test_it_predicts_text_that_it_was_not_trained_on(model: LlamaForCausalLM, held_out: tuple[list[int], str]) -> None:
    assert bits_per_byte(model, *held_out) < 1.6
    assert bits_per_byte(model, held_out[0][::-1], held_out[1]) > 3.0


def test_depth_is_used(held_out: tuple[list[int], str]) -> None:
    """Checks that dropping the card's pair of layers costs about the loss in the card, clearly more than nothing."""
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    row = re.search(r"\| (\d+) and (\d+) \(the two that cost least.*\| \+(\d\.\d+) \|", card)
    assert row is not None
    assert float(row[3]) >= 0.04
    model = LlamaForCausalLM.from_pretrained(FOLDER, local_files_only=True).eval()
    whole = bits_per_byte(model, *held_out)
    kept = [layer for i, layer in enumerate(model.model.layers) if i not in (int(row[1]), int(row[2]))]
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    assert bits_per_byte(model, *held_out) - whole == pytest.approx(float(row[3]), rel=0.5)


def test_card_and_log_agree() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"held-out bits per byte \| \*\*(\d\.\d+)\*\*", card)
    last = json.loads((FOLDER / "training.jsonl").read_text().splitlines()[-1])
    assert stated is not None
    assert float(stated[1]) == pytest.approx(last["held_out_bits_per_byte"], abs=0.05)
    assert all(f"`{name}`" in card for name in HELD_OUT)
    assert "{" not in card


def test_the_model_and_its_texts_are_copied_out(tmp_path: Path) -> None:
    copy_out(tmp_path / "shipped")
    assert (tmp_path / "shipped" / "stdlib-5m" / "config.json").is_file()
    texts = (tmp_path / "shipped" / "held-out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in texts] == list(held_out_documents())
    with pytest.raises(FolderError, match="a new folder is required"):
        copy_out(tmp_path / "shipped")
