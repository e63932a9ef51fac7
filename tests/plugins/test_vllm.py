"""vLLM serves folded folders: the tokens and logits of transformers, in other processes.

`REFOLD_VLLM_PYTHON` names the interpreter of an environment that has vLLM and this checkout (`make test-vllm`).
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from refold.conversion.convert import ConvertOptions, convert
from refold.modeling.load import load_model

VARIABLE = "REFOLD_VLLM_PYTHON"
pytestmark = [
    pytest.mark.skipif(
        VARIABLE not in os.environ, reason=f"{VARIABLE} is required: the interpreter of vLLM's environment"
    ),
    pytest.mark.timeout(1800),
]
RUNNER = """
import json, sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    job = json.loads(sys.argv[1])
    for folder in job["folders"]:
        try:
            engine = LLM(
                model=folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=160,
                max_num_seqs=4, enable_prefix_caching=False, max_logprobs=96, **job["options"],
            )
        except Exception as error:
            print("FOUND" + json.dumps({"error": str(error)}), flush=True)
            continue
        settings = SamplingParams(
            temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False, logprobs=96
        )
        prompts = [{"prompt_token_ids": each} for each in job["prompts"]]
        answers = [each.outputs[0] for each in engine.generate(prompts, settings, use_tqdm=False)]
        first = [{token: entry.logprob for token, entry in each.logprobs[0].items()} for each in answers]
        found = {"tokens": [list(each.token_ids) for each in answers], "first": first}
        print("FOUND" + json.dumps(found), flush=True)
        del engine
"""
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
NUM_TOKENS = 64
PROMPTS = [
    torch.randint(2, 95, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (5, 17, 30)
]
FOLD = {"loops": 2, "init": "average"}
# vLLM's attention on a CPU has heads of 32 and more.
HEADS = {"head_dim": 32}
WIDE = {"hidden_size": 128}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "strict": ("llama", {"fold": FOLD}, HEADS),
    "relaxed": ("llama-mha-bias", {"fold": FOLD, "relax": {"rank": 4}}, HEADS),
    "own vectors and gains": (
        "llama-mha-bias",
        {"fold": FOLD, "relax": {"rank": 2, "vectors": "own", "gain": "own"}},
        HEADS,
    ),
    "low rank": ("llama", {"factor": {"parameters": 0.5, "weight": "none"}}, HEADS),
    "basis": ("llama", {"fold": FOLD, "factor": {"parameters": 0.6, "share": "basis", "weight": "none"}}, HEADS),
    "attention dropped": ("llama", {"drop": {"attention": {"layers": [1]}}}, HEADS),
    "MLP dropped": ("llama", {"drop": {"mlp": {"layers": [2]}}}, HEADS),
    "block dropped": ("llama-mqa-mlp-bias", {"drop": {"block": {"layers": [1]}}}, HEADS),
    "window": ("mistral-window", {"fold": FOLD}, HEADS),
    "shared keys": ("llama", {"fold": FOLD, "share_kv": {"from": "first_loop"}}, HEADS),
    "exits": ("llama", {"fold": FOLD, "exits": {"at": [1], "head_rank": 2}}, HEADS),
    "gemma2": ("gemma2", {"fold": FOLD, "relax": {"rank": 2}}, HEADS),
    "gemma3": ("gemma3_text", {}, HEADS),
    "qwen2": ("qwen2", {"fold": FOLD}, WIDE),
    "qwen3": ("qwen3", {"fold": FOLD, "relax": {"rank": 2}}, HEADS),
    "gpt_neox": ("gpt_neox", {"fold": FOLD, "relax": {"rank": 2}}, WIDE),
    "olmo2": ("olmo2", {"fold": FOLD}, WIDE),
    "phi3": ("phi3", {}, WIDE),
    "hybrid": ("llama", {"mixers": [{"depths": [2], "type": "retention"}]}, HEADS),
}
SPLIT = ("own vectors and gains", "basis", "block dropped", "gpt_neox")
"""Cases that are also split between two processes: adapters, factors, one key-value head for both, packed biases."""


def serve(folders: list[Path], scratch: Path, **options: Any) -> list[dict[str, Any]]:
    """Runs folders in one process of vLLM."""
    script = scratch / "runner.py"
    script.write_text(RUNNER)
    job = {"folders": [str(each) for each in folders], "prompts": PROMPTS, "tokens": NUM_TOKENS, "options": options}
    command = [os.environ[VARIABLE], str(script), json.dumps(job)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1700, env={**os.environ, **SETTINGS}, cwd=scratch
    )
    found = [json.loads(line.removeprefix("FOUND")) for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert len(found) == len(folders), done.stderr[-4000:]
    return found


@torch.no_grad()
def check(folder: Path, found: dict[str, Any]) -> None:
    """Compares tokens, and logits within 1e-4 of the largest, with transformers'."""
    model: Any = load_model(folder, device="cpu", dtype="float32")
    options = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": 0}
    for prompt, tokens, first in zip(PROMPTS, found["tokens"], found["first"], strict=True):
        logits = model(torch.tensor([prompt])).logits[0, -1]
        served = torch.tensor([first[str(token)] for token in range(len(logits))])
        assert (served - logits.log_softmax(-1)).abs().max() < 1e-4 * logits.abs().max()
        assert tokens == model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


def exchange_loops(folder: Path, out: Path) -> Path:
    """Copies a fold of two loops with the LoRAs of the loops exchanged."""
    shutil.copytree(folder, out)
    (path,) = out.glob("*.safetensors")
    held = load_file(path)
    names = {name: name for name in held}
    for first, second in ((0, 2), (1, 3)):
        for name in held:
            if name.startswith(f"model.depths.{first}.lora."):
                other = name.replace(f"depths.{first}.", f"depths.{second}.")
                names[name], names[other] = other, name
    save_file({name: held[other].clone() for name, other in names.items()}, path, metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def folders(make_source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("folded")
    made = {}
    for name, (variant, recipe, fields) in CASES.items():
        made[name] = place / name.replace(" ", "-")
        source = make_source(variant, **fields)
        convert(source, made[name], recipe, options=ConvertOptions(allow_larger=True))
    return made


@pytest.fixture(scope="module")
def served(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    scratch = tmp_path_factory.mktemp("vllm")
    exchanged = exchange_loops(folders["relaxed"], scratch / "exchanged")
    found = serve([*folders.values(), exchanged], scratch)
    return dict(zip((*folders, "exchanged"), found, strict=True))


@pytest.mark.parametrize("name", [name for name in CASES if name != "hybrid"])
def test_tokens_and_logits_are_those_of_transformers(
    folders: dict[str, Path], served: dict[str, dict[str, Any]], name: str
) -> None:
    check(folders[name], served[name])


def test_loras_of_the_wrong_loop_give_other_tokens(served: dict[str, dict[str, Any]]) -> None:
    assert served["exchanged"]["tokens"] != served["relaxed"]["tokens"]


def test_mixers_with_a_state_are_refused_by_name(served: dict[str, dict[str, Any]]) -> None:
    assert "attention at every depth that has a mixer is required (got depth 2: retention)" in served["hybrid"]["error"]


def test_two_processes_give_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    chosen = [folders[name] for name in SPLIT]
    for folder, found in zip(chosen, serve(chosen, tmp_path, **options), strict=True):
        check(folder, found)
