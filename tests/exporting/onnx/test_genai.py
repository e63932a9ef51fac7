"""ONNX Runtime GenAI generates from exported folders in its own loop, in an environment of its own."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from refold.exporting.export import export
from refold.modeling.load import load_model

pytest.importorskip("onnx")

RUN = """
import json, sys
import onnxruntime_genai as og

answers = []
for job in json.loads(sys.argv[1]):
    model = og.Model(job["folder"])
    tokenizer = og.Tokenizer(model)
    prompts = [tokenizer.encode(text).tolist() for text in job["texts"]]
    length = max(map(len, prompts)) + job["num_tokens"]
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(prompts))
    generator = og.Generator(model, params)
    generator.append_tokens(tokenizer.encode_batch(job["texts"]))
    while not generator.is_done():
        generator.generate_next_token()
    rows = [generator.get_sequence(row).tolist() for row in range(len(prompts))]
    answers.append({"prompts": prompts, "rows": rows, "text": tokenizer.decode(prompts[0])})
print(json.dumps(answers))
"""
TEXTS = ["The sea was calm that night"]
FOLD = {"loops": 2}
CASES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "source": ("llama", None),
    "strict": ("llama", {"fold": FOLD}),
    "relaxed": ("llama-mqa-mlp-bias", {"fold": FOLD, "relax": {"type": "lora", "rank": 5}}),
    "low-rank": ("llama", {"factor": {"parameters": 0.5, "weight": "none"}}),
    "no-attention": ("llama", {"drop": {"attention": {"layers": [0, 2]}}}),
    "dropped-everything-somewhere": ("llama", {"drop": {"block": {"layers": [1]}}}),
    "windowed": ("mistral-window", {"fold": FOLD}),
    "shared-keys": ("llama", {"share_kv": [{"depth": 2, "from": 1}]}),
    "prefix": ("llama", {"fold": FOLD, "relax": {"type": "prefix", "length": 3}}),
    "hybrid": ("llama", {"mixers": [{"type": "gated_deltanet", "except": [1]}]}),
    "retention": ("llama", {"mixers": [{"type": "retention", "except": [1]}]}),
    "lolcats": ("llama", {"mixers": [{"type": "linear_attention", "window": 3}]}),
    "striped-mamba": ("llama", {"mixers": [{"type": "mamba", "transfer": ["mlp"]}]}),
    "gemma2": ("gemma2", {"fold": FOLD}),
}


@pytest.fixture(scope="module")
def genai() -> str:
    python = os.environ.get("REFOLD_GENAI_PYTHON", "")
    if not Path(python).is_file():
        pytest.skip("REFOLD_GENAI_PYTHON must name the Python of an environment with onnxruntime-genai")
    return python


def run_genai(python: str, jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = subprocess.run([python, "-c", RUN, json.dumps(jobs)], capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout.splitlines()[-1])


def test_genai_continues_as_the_model_does(fold, genai, tmp_path):
    folders = {case: fold(*CASES[case]) for case in CASES}
    jobs = [
        {"folder": str(export(folder, tmp_path / case, "onnx")), "texts": TEXTS, "num_tokens": 64}
        for case, folder in folders.items()
    ]
    for (case, folder), answer in zip(folders.items(), run_genai(genai, jobs), strict=True):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = load_model(folder)
        prompt = tokenizer(TEXTS[0])["input_ids"]
        assert answer["prompts"] == [prompt], case
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False)
        assert answer["rows"] == wanted.tolist(), case
        assert answer["text"] == TEXTS[0], case


def test_rows_of_a_batch_are_as_rows_of_their_own(fold, genai, tmp_path):
    texts = [TEXTS[0], "A short one."]
    for case in ("strict", "shared-keys"):
        folder = str(export(fold(*CASES[case]), tmp_path / case, "onnx"))
        alone = [{"folder": folder, "texts": [text], "num_tokens": 20} for text in texts]
        *single, batch = run_genai(genai, [*alone, {"folder": folder, "texts": texts, "num_tokens": 20}])
        length = max(map(len, batch["prompts"]))
        assert len(set(map(len, batch["prompts"]))) == 2, "rows of different lengths are padded"
        for row, each in zip(batch["rows"], single, strict=True):
            assert row[length : length + 20] == each["rows"][0][-20:]
