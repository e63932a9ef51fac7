"""Fixtures for tests that run exported files in llama.cpp and mlx-lm, each in an environment of its own."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ENGINES = Path(__file__).parent / "engines"
PROMPTS = [[5, 9, 40, 60, 61, 62, 70, 71], [17, 90, 33, 34, 35, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62]]
NUM_TOKENS = 64
VOCAB_SIZE = 160
END_TOKEN = 2

Answers = list[dict[str, Any]]
RunEngine = Callable[[list[dict[str, Any]]], Answers]


class Gap(NamedTuple):
    """Distance of an engine from the model: of logits, relative to the largest, and of greedy tokens."""

    logits: float
    greedy: float
    """The most that a chosen token's logit lies below the best, relative to the largest."""
    has_equal_tokens: bool


def _engine(variable: str, script: str, tmp_path_factory: pytest.TempPathFactory) -> RunEngine:
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} is required: it names the interpreter of the engine's environment")
    answers = tmp_path_factory.mktemp("answers") / "answers.json"

    def ask(jobs: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(python), str(ENGINES / script)],
            input=json.dumps(jobs),
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "ANSWERS": str(answers)},
        )

    def run(jobs: list[dict[str, Any]]) -> Answers:
        try:
            done = ask(jobs)
        except subprocess.TimeoutExpired:
            # The process of llama.cpp was seen to stand still on a busy machine, for a job of half a second.
            done = ask(jobs)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return json.loads(answers.read_text())

    return run


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> RunEngine:
    return _engine("REFOLD_LLAMA_PYTHON", "run_llama.py", tmp_path_factory)


@pytest.fixture(scope="session")
def mlx(tmp_path_factory: pytest.TempPathFactory) -> RunEngine:
    return _engine("REFOLD_MLX_PYTHON", "run_mlx.py", tmp_path_factory)


@pytest.fixture(scope="session")
def make_named(make_source, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a source with a byte-level tokenizer whose tokens are ASCII: llama.cpp holds back parts of other signs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = [chr(sign) for sign in range(33, 127)] + ["\u0120", "\u010a"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=letters
    )
    text = "It was the best of times, it was the worst of times, it was the age of wisdom, the season of hope."
    tokenizer.train_from_iterator([text, text, "the winter of despair, in short, the period"], trainer)

    def make(variant: str = "llama", **fields: Any) -> Path:
        folder = tmp_path_factory.mktemp("named")
        shutil.copytree(make_source(variant, vocab_size=VOCAB_SIZE, **fields), folder, dirs_exist_ok=True)
        named = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        )
        named.save_pretrained(folder)
        return folder

    return make


def job(model: Path, **fields: Any) -> dict[str, Any]:
    """Returns a job for an engine: logits behind each prompt, and a greedy continuation."""
    return {
        "model": str(model),
        "prompts": PROMPTS,
        "num_tokens": NUM_TOKENS,
        "vocab_size": VOCAB_SIZE,
        **fields,
    }


@pytest.fixture(scope="session")
def make_job() -> Callable[..., dict[str, Any]]:
    return job


@torch.no_grad()
def measure(model: Any, answer: dict[str, Any], end: int | None = END_TOKEN) -> Gap:
    """Compares a model with an engine's answer."""
    logits_gap = greedy_gap = 0.0
    for prompt, tokens, found in zip(PROMPTS, answer["tokens"], answer["logprobs"], strict=True):
        assert len(tokens) == NUM_TOKENS
        logits = model(torch.tensor([prompt + tokens])).logits[0].float()
        behind = logits[len(prompt) - 1 : -1]
        scale = behind.abs().max(-1).values
        known = torch.tensor([index for index, value in enumerate(found) if value is not None])
        wanted = behind[0].log_softmax(-1)[known]
        got = torch.tensor([value for value in found if value is not None])
        assert len(known) > 0.9 * len(found)
        logits_gap = max(logits_gap, float((wanted - got).abs().max() / behind[0].abs().max()))
        if end is not None:
            # llama.cpp was told not to end.
            behind = behind.index_fill(1, torch.tensor([end]), -torch.inf)
        chosen = behind.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        greedy_gap = max(greedy_gap, float(((behind.max(-1).values - chosen) / scale).max()))
    return Gap(logits_gap, greedy_gap, greedy_gap == 0.0)


@pytest.fixture(scope="session")
def gap() -> Callable[..., Gap]:
    return measure
