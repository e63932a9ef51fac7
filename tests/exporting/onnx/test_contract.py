"""Every kind of stack computes the same in ONNX Runtime as in refold."""

from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
import torch

from refold.exporting.export import export
from refold.modeling.load import load_model
from tests.exporting.onnx.runtime import Graph, largest_error, model_logits, padded_tokens

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FOLD = {"loops": 2}
LORA = {"type": "lora", "rank": 5}
FACTOR = {"parameters": 0.5, "weight": "none"}
OWN = {**LORA, "vectors": "own"}


def mixed(kind: str, **options: Any) -> dict[str, Any]:
    return {"mixers": [{"type": kind, "except": [1], **options}]}


ATTENTION: dict[str, tuple[str, dict[str, Any]]] = {
    "identity": ("llama", {}),
    "strict": ("llama-v4", {"fold": FOLD}),
    "relaxed": ("llama-mha-bias", {"fold": FOLD, "relax": LORA}),
    "relaxed-own-vectors": ("llama-mha-bias", {"fold": FOLD, "relax": {**OWN, "gain": "own"}}),
    "tied-head": ("llama-mqa-mlp-bias", {"fold": FOLD, "relax": LORA}),
    "llama3-rope": ("llama-llama3", {"fold": {**FOLD, "prelude": 1, "coda": 1}}),
    "linear-rope": ("llama-linear", {"fold": FOLD}),
    "dynamic-rope": ("llama-dynamic", {"fold": FOLD}),
    "yarn-rope": ("llama-yarn", {"fold": FOLD}),
    "low-rank": ("llama-mha-bias", {"factor": FACTOR}),
    "shared-bases": ("llama-mha-bias", {"fold": FOLD, "factor": {**FACTOR, "share": "basis"}}),
    "own-widths": ("llama-mha-bias", {"width": {"mlp": [48, 32, 16, 40], "heads": [1, 2, 4, 3], "weight": "none"}}),
    "no-attention": ("llama-mha-bias", {"drop": {"attention": {"layers": [0, 2]}}}),
    "no-mlp": ("llama-mqa-mlp-bias", {"drop": {"mlp": {"count": 1}}}),
    "nothing-at-a-depth": ("llama", {"drop": {"attention": {"layers": [1]}, "mlp": {"layers": [1, 3]}}}),
    "exits": ("llama", {"fold": FOLD, "exits": {"at": [1], "norm": "own", "head_rank": 2, "gate": True}}),
    "prefix": ("llama", {"fold": FOLD, "relax": {"type": "prefix", "length": 3}}),
    "shared-keys": ("llama", {"share_kv": [{"depth": 2, "from": 1}]}),
    "shared-heads": ("llama", {"share_kv": [{"depth": 2, "from": 1, "heads": [1]}, {"depth": 3, "from": 1}]}),
    "mistral": ("mistral-window", {"fold": FOLD, "relax": LORA}),
    "mistral-head-dim": ("mistral-head-dim", {"fold": FOLD}),
    "gpt_neox": ("gpt_neox", {"fold": FOLD, "relax": OWN}),
    "gpt_neox-sequential": ("gpt_neox-sequential", {"fold": FOLD}),
    "gpt_neox-tied": ("gpt_neox-tied", {"drop": {"mlp": {"layers": [0]}}}),
    "gpt_neox-no-attention": ("gpt_neox", {"drop": {"attention": {"layers": [2]}}}),
    "qwen2": ("qwen2-window", {"fold": FOLD, "relax": LORA}),
    "qwen3": ("qwen3", {"fold": FOLD, "relax": OWN}),
    "gemma": ("gemma", {"fold": FOLD, "relax": {**OWN, "gain": "own"}}),
    "gemma2": ("gemma2", {"fold": FOLD, "relax": OWN}),
    "gemma2-shared-keys": ("gemma2", {"share_kv": [{"depth": 2, "from": 0}]}),
    "gemma3": ("gemma3_text-v4", {"fold": FOLD}),
    "olmo2": ("olmo2-bias", {"fold": FOLD, "relax": LORA}),
    "phi3": ("phi3", {"fold": FOLD}),
    "phi3-window": ("phi3-window", {"drop": {"attention": {"layers": [0]}}}),
}
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "retention": ("llama", mixed("retention")),
    "lightning": ("llama", mixed("retention", decay="slopes", norm="full", activation="silu", gate="sigmoid")),
    "gla": ("llama-mha-bias", mixed("gla")),
    "liger": ("llama", mixed("gla", decay_from="keys", activation="softmax", norm="none", gate="none")),
    "mamba": ("llama", mixed("mamba", transfer=["mlp"])),
    "mamba2": ("llama", mixed("mamba2", q_heads=2, k_heads=2)),
    "mamba2-plain": ("llama", mixed("mamba2", conv=0, norm="none", gate="none")),
    "gated-deltanet": ("qwen3", mixed("gated_deltanet")),
    "deltanet": ("llama", mixed("gated_deltanet", decay=False, rotary=True)),
    "hedgehog": ("llama", mixed("linear_attention")),
    "favor": ("llama", mixed("linear_attention", feature_map="favor")),
    "dijiang": ("llama", mixed("linear_attention", feature_map="dijiang", normalise=False)),
    "elu": ("gemma3_text", mixed("linear_attention", feature_map="elu")),
    "t2r": ("mistral-full", mixed("linear_attention", feature_map="t2r")),
    "lolcats": ("llama-mha-bias", mixed("linear_attention", window=3)),
    "favor-window": ("llama", mixed("linear_attention", feature_map="favor", window=4)),
    "folded-hybrid": ("llama", {"fold": FOLD, "relax": LORA, "mixers": [{"type": "mamba2", "depths": {"every": 2}}]}),
}
CASES = {**ATTENTION, **RECURRENT}
LONG = {"mistral-head-dim", "gpt_neox-sequential", "gpt_neox-tied", "gemma2-shared-keys", "phi3-window", "linear-rope"}
LONG |= {"lightning", "liger", "mamba2-plain", "deltanet", "favor", "dijiang", "elu", "t2r"}
"""Variants of cases that stay."""


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.long] * (case in LONG)) for case in CASES])
def test_a_graph_computes_the_logits_of_its_model(fold, tmp_path, case):
    folder = fold(*CASES[case])
    graph, model = Graph(export(folder, tmp_path / "out", "onnx")), load_model(folder)
    tokens, mask = padded_tokens(model.config.vocab_size)
    assert largest_error(graph(tokens, mask), model_logits(model, tokens, mask), mask) < 1e-4
    graph.forget()
    steps = [0, 9, *range(10, tokens.shape[1] + 1)]
    pieces = [graph(tokens[:, start:stop], mask[:, :stop]) for start, stop in pairwise(steps)]
    assert largest_error(np.concatenate(pieces, axis=1), model_logits(model, tokens, mask, steps), mask) < 1e-4


@pytest.mark.parametrize("case", ["identity", "strict", "gemma2", "gla"])
def test_a_graph_continues_a_prompt_as_its_model(fold, tmp_path, case):
    folder = fold(*CASES[case])
    graph, model = Graph(export(folder, tmp_path / "out", "onnx")), cast("Any", load_model(folder))
    prompt = [5, 17, 44, 90, 3, 8, 61]
    found = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
    assert graph.continue_greedily(prompt, 64) == found[0, len(prompt) :].tolist()
