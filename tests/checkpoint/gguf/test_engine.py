"""A GGUF file computes in refold as in llama.cpp."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from refold.modeling.load import load_model, load_tokenizer

RUN = Path(__file__).with_name("llama_run.py")
PROMPT, NUM_TOKENS = [5, 77, 200, 41, 9, 120], 64
ENDLESS: dict[str, Any] = {"eos_token_id": -1, "suppress_tokens": [2]}
"""As `ignore_eos` of llama.cpp: the end token is never chosen."""
HEAD = {"query_pre_attn_scalar": 16, "sliding_window": 512}
# ggml looks GELU up in a table of 16 bits, which no setting switches off.
EXACT, BY_TABLE = 1e-4, 2e-2
MODELS: dict[str, tuple[str, dict[str, Any], float]] = {
    "llama": ("llama", {}, EXACT),
    "llama-llama3": ("llama-llama3", {"hidden_act": "silu"}, EXACT),
    "mistral": ("mistral-full", {"hidden_act": "silu"}, EXACT),
    "qwen2": ("qwen2", {}, EXACT),
    "qwen3": ("qwen3", {"attention_bias": False}, EXACT),
    "olmo2": ("olmo2", {}, EXACT),
    "phi3": ("phi3", {}, EXACT),
    "gemma": ("gemma", {}, BY_TABLE),
    "gemma2": ("gemma2", HEAD, BY_TABLE),
    "gemma3": ("gemma3_text", {**HEAD, "sliding_window_pattern": 6}, BY_TABLE),
    "gpt_neox": ("gpt_neox", {}, BY_TABLE),
}


@pytest.fixture(scope="session")
def run_llama() -> Callable[..., dict[str, Any]]:
    """Returns a function that runs a file in llama.cpp; skips where no environment with it is named."""
    python = os.environ.get("REFOLD_LLAMA_PYTHON")
    if not python:
        pytest.skip("an environment with llama.cpp is required: set REFOLD_LLAMA_PYTHON to its interpreter")

    def run(path: Path, **request: Any) -> dict[str, Any]:
        asked = json.dumps({"texts": [], "ids": PROMPT, "num_tokens": 1, "vocab_size": 300, **request})
        done = subprocess.run([python, str(RUN), str(path)], input=asked, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return run


def name_in_ascii(writer: Any) -> None:
    """Renames all tokens: the server gives no probabilities of tokens that are a part of a character."""
    for key in ("tokens", "merges"):
        writer.kv_data[0].pop(f"tokenizer.ggml.{key}")
    writer.add_token_list([f"t{number}" for number in range(300)])
    writer.add_token_merges(["t 0"])


def compare(path: Path, answer: dict[str, Any]) -> tuple[float, float]:
    """Returns the largest difference of log probabilities along llama.cpp's text, and the largest logit."""
    steps = answer["steps"]
    ids = torch.tensor([[*PROMPT, *(step["id"] for step in steps[:-1])]])
    with torch.inference_mode():
        logits = load_model(path, dtype="float32")(ids).logits[0, len(PROMPT) - 1 :]
    worst = 0.0
    for row, step in zip(logits.log_softmax(-1), steps, strict=True):
        found = torch.tensor([step["logprobs"][str(number)] for number in range(len(step["logprobs"]))])
        worst = max(worst, float((row - found).abs().max()))
    return worst, float(logits.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_probabilities_are_those_of_llama_cpp(
    name: str,
    make_model: Callable[..., Path],
    write_gguf: Callable[..., Path],
    run_llama: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    variant, fields, tolerance = MODELS[name]
    path = write_gguf(make_model(variant, **fields), tmp_path / "model.gguf", edit=name_in_ascii)
    answer = run_llama(path, num_tokens=NUM_TOKENS)
    assert len(answer["steps"]) == NUM_TOKENS
    worst, largest = compare(path, answer)
    assert worst <= tolerance * largest
    if tolerance == EXACT:
        model: Any = load_model(path, dtype="float32")
        made = model.generate(torch.tensor([PROMPT]), max_new_tokens=NUM_TOKENS, do_sample=False, **ENDLESS)
        assert made[0, len(PROMPT) :].tolist() == [step["id"] for step in answer["steps"]]


def test_rows_in_the_order_of_the_file_are_told_apart(
    make_model: Callable[..., Path],
    write_gguf: Callable[..., Path],
    run_llama: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_gguf(make_model("llama"), tmp_path / "model.gguf", edit=name_in_ascii)
    answer = run_llama(path, num_tokens=8)
    monkeypatch.setattr("refold.checkpoint.gguf.stored.find_rows", lambda stored, num_rows: None)
    worst, largest = compare(path, answer)
    assert worst > 0.05 * largest


def test_text_gets_the_tokens_of_llama_cpp(
    make_model: Callable[..., Path],
    write_gguf: Callable[..., Path],
    run_llama: Callable[..., dict[str, Any]],
    sentences: tuple[str, ...],
    tmp_path: Path,
) -> None:
    texts = [*sentences, "it's 12345 <s>x</s>\n\n\n  tabs\t\tand   spaces  ", "HTMLPage ÜBER naïve 3.14 2026-01-02!!!"]
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "dbrx", "default"):

        def choose(writer: Any, pre: str = pre) -> None:
            writer.kv_data[0].pop("tokenizer.ggml.pre")
            writer.add_tokenizer_pre(pre)

        path = write_gguf(make_model("llama"), tmp_path / f"{pre}.gguf", edit=choose)
        answer = run_llama(path, texts=texts)
        tokenizer = load_tokenizer(path)
        assert [tokenizer.encode(text) for text in texts] == answer["texts"], pre
