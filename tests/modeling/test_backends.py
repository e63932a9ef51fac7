"""Attention back-ends of engines: continuous batching of transformers, and heads that come back flat."""

from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from refold.errors import RefoldError

FOLD = {"loops": 2, "init": "average"}
RECIPES: dict[str, dict[str, Any]] = {
    "narrow": {"width": {"mlp": [48, 32, 16, 40], "heads": 0.5, "weight": "none"}},
    "strict": {"fold": FOLD},
    "relaxed": {"fold": FOLD, "relax": {"rank": 3, "vectors": "own"}},
    "low rank": {"factor": {"parameters": 0.6, "weight": "none"}},
    "basis": {"fold": FOLD, "factor": {"parameters": 0.6, "share": "basis", "weight": "none"}},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "recurrent": ({"mixers": [{"type": "retention"}]}, r"depth 0 keeps a recurrent state"),
    "hybrid": ({"mixers": [{"type": "retention", "except": [0]}]}, r"depth 1 keeps a recurrent state"),
    "dropped": ({"drop": {"attention": {"layers": [2]}}}, r"depth 2 .*no cache"),
    "shared": ({"fold": FOLD, "share_kv": {"from": "first_loop", "heads": [1]}}, r"depth 2 reads keys"),
    "prefix": ({"fold": FOLD, "relax": {"type": "prefix", "length": 3}}, r"depth 0 has a prefix"),
}


def run_paged(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Generates by continuous batching."""
    settings = GenerationConfig(max_new_tokens=7, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=128)
    found = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=batching)
    return [each.generated_tokens for each in found.values()]


@pytest.mark.parametrize(
    ("name", "variant", "attn"),
    [
        ("strict", "llama", "sdpa"),
        ("relaxed", "mistral-window", "sdpa"),
        ("relaxed", "llama", "eager"),
        ("low rank", "llama", "sdpa"),
        ("basis", "llama", "sdpa"),
        ("narrow", "llama-mha-bias", "sdpa"),
        ("strict", "mistral-window", "eager"),
        ("relaxed", "gemma3_text", "sdpa"),
        ("relaxed", "qwen3-window", "sdpa"),
        ("relaxed", "gpt_neox", "sdpa"),
    ],
)
def test_continuous_batching_generates_what_generate_does(load, tokens, name, variant, attn):
    model = load(variant, RECIPES[name], attn=attn)
    prompts = [tokens[0].tolist(), tokens[1, :9].tolist(), tokens[1, 3:].tolist()]
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = [model.generate(torch.tensor([each]), **options)[0, len(each) :].tolist() for each in prompts]
    assert run_paged(model, prompts) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_stacks_that_paged_caches_cannot_hold_are_refused(load, tokens, name):
    recipe, reason = REFUSED[name]
    with pytest.raises(
        RefoldError, match=rf"generate_batch: .*\({reason}.*, which is not supported yet\); use generate"
    ):
        run_paged(load("llama", recipe), [tokens[0].tolist()])


def test_different_numbers_of_heads_are_refused(load, tokens):
    narrow = {"width": {"heads": [1, 2, 2, 1], "weight": "none"}}
    with pytest.raises(RefoldError, match=r"generate_batch: the same number of key-value heads .* \(got 1, 2, which"):
        run_paged(load("llama", narrow), [tokens[0].tolist()])


def test_soft_caps_are_refused_because_paged_attention_ignores_them(load, tokens):
    with pytest.raises(RefoldError, match=r"generate_batch: attention without a soft-cap .*\(got 2"):
        run_paged(load("gemma2", {}), [tokens[0].tolist()])


def test_soft_caps_stand_on_the_config(load):
    capped, plain = load("gemma2", {}).config, load("llama", {}).config
    arch = capped.read_blueprint().arch
    assert (capped.attn_logit_softcapping, capped.final_logit_softcapping) == (
        arch.attention_softcap,
        arch.logit_softcap,
    )
    assert capped.attn_logit_softcapping is not None
    assert (plain.attn_logit_softcapping, plain.final_logit_softcapping) == (None, None)


@pytest.mark.parametrize("recipe", [{"fold": FOLD}, {"fold": FOLD, "relax": {"rank": 3}}])
@torch.no_grad()
def test_heads_may_come_back_flat_as_engines_return_them(load, tokens, monkeypatch, recipe):
    model = load("llama", recipe, attn="sdpa")
    expected = model(tokens[:1]).logits
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    calls = []

    def flat(module: Any, query: Any, key: Any, value: Any, mask: Any, **arguments: Any) -> Any:
        calls.append(module.layer_idx)
        heads, _ = plain(module, query, key, value, mask, **arguments)
        return heads.reshape(-1, query.shape[1] * query.shape[3]), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flat", flat)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flat")
    assert torch.equal(model(tokens[:1]).logits, expected)
    assert calls == [0, 1, 2, 3]
