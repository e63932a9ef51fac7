"""Packed documents are separated in every way of running a model."""

import pytest
import torch
from transformers import DynamicCache

from refold.errors import RefoldError

LENGTHS = (7, 9, 8)
RECIPES = {"identity": None, "tied": {"fold": {"loops": 2}, "relax": {"rank": 4}}}
KINDS = [
    ("llama", None),
    ("mistral-window", None),
    ("gpt_neox", None),
    ("mistral-head-dim", RECIPES["tied"]),
    ("qwen3-window", None),
    ("gemma2", RECIPES["tied"]),
    ("gemma3_text", RECIPES["tied"]),
    ("olmo2", None),
    ("phi3-window", None),
]


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max() / other.abs().max()) < 2e-5


@pytest.fixture
def positions() -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in LENGTHS]).expand(2, -1)


def alone(model, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(document).logits for document in tokens.split(LENGTHS, dim=1)], dim=1)


@pytest.mark.parametrize(
    ("variant", "recipe", "attn"),
    [(*kind, attn) for kind in KINDS for attn in ("eager", "sdpa") if (kind[0], attn) != ("gemma2", "sdpa")],
)
@torch.no_grad()
def test_packed_documents_give_what_each_gives_alone(load, tokens, positions, variant, recipe, attn):
    model = load(variant, recipe, attn=attn)
    expected = alone(model, tokens)
    for training in (False, True):
        model.train(training)
        for arguments in ({"use_cache": False}, {"use_cache": True}, {"attention_mask": torch.ones_like(tokens)}):
            assert close(model(tokens, position_ids=positions, **arguments).logits, expected), arguments
        assert close(model(tokens, position_ids=positions[:1]).logits, expected)
    leaking = model(tokens).logits
    assert close(leaking[:, : LENGTHS[0]], expected[:, : LENGTHS[0]])
    assert not torch.allclose(leaking[:, LENGTHS[0] :], expected[:, LENGTHS[0] :], atol=0.1)


@pytest.mark.parametrize(("variant", "recipe"), KINDS)
@pytest.mark.parametrize("chunk", [1, 3])
@torch.no_grad()
def test_the_last_document_goes_on_alone_from_a_packed_cache(load, tokens, positions, variant, recipe, chunk):
    model = load(variant, recipe)
    expected = alone(model, tokens)
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        given = [model(tokens[:, :18], position_ids=positions[:, :18], past_key_values=cache).logits]
        for start in range(18, 24, chunk):
            part = slice(start, start + chunk)
            given.append(model(tokens[:, part], position_ids=positions[:, part], past_key_values=cache).logits)
        assert close(torch.cat(given, dim=1), expected)


@torch.no_grad()
def test_a_document_that_begins_in_a_later_call_does_not_see_the_cache(load, tokens, positions):
    model = load("llama")
    cache = DynamicCache(config=model.config)
    parts = [slice(0, 11), slice(11, 16), slice(16, 24)]
    given = [model(tokens[:, part], position_ids=positions[:, part], past_key_values=cache).logits for part in parts]
    assert close(torch.cat(given, dim=1), alone(model, tokens))


@torch.no_grad()
def test_packed_documents_stay_apart_behind_padding(load, tokens, positions):
    model = load("llama")
    padding = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.cat((padding, torch.ones_like(tokens)), dim=1)
    padded = model(
        torch.cat((padding, tokens), dim=1),
        attention_mask=mask,
        position_ids=torch.cat((padding, positions), dim=1),
    )
    assert close(padded.logits[:, 3:], alone(model, tokens))


@torch.no_grad()
def test_rows_may_be_packed_differently(load, tokens):
    model = load("llama")
    positions = torch.stack((torch.arange(24), torch.cat((torch.arange(10), torch.arange(14)))))
    given = model(tokens, position_ids=positions).logits
    assert close(given[0], model(tokens[:1]).logits[0])
    assert close(given[1, 10:], model(tokens[1:, 10:]).logits[0])


@torch.no_grad()
def test_positions_that_start_later_are_one_document(load, load_source, tokens):
    positions = torch.arange(24).expand(2, -1) + 5
    given = load("llama")(tokens, position_ids=positions).logits
    assert close(given, load_source("llama")(tokens, position_ids=positions).logits)


def test_gradients_do_not_cross_documents(load, tokens, positions):
    model = load("llama").train()
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=embeddings, position_ids=positions).logits[:, 16:].square().sum().backward()
    assert embeddings.grad is not None
    assert not embeddings.grad[:, :16].any()
    assert embeddings.grad[:, 16:].any()


def test_flash_attention_refuses_what_it_cannot_keep_apart(load, tokens, positions):
    model = load("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(RefoldError, match=r"packed documents need sdpa, eager .* \(got flash_attention_2\)"):
        model(tokens, position_ids=positions)
