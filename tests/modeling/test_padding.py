"""Padding after or between tokens: attention as in transformers' Llama, states as for each row alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from refold.errors import RefoldError
from refold.modeling.masks import document_starts, state_resets
from refold.modeling.padding import padding_first

MASKS = {
    "right": [[1, 0, 0, 0], [1, 1, 0, 0]],
    "right of one row": [[1, 1, 1, 1], [1, 1, 0, 0]],
    "both sides": [[0, 1, 1, 0], [0, 0, 1, 1]],
    "holes": [[1, 0, 1, 1], [1, 1, 0, 1]],
    "holes at the end": [[1, 0, 1, 0], [0, 1, 0, 1]],
}
MIXERS: dict[str, dict[str, Any]] = {
    "retention": {"type": "retention"},
    "favor": {"type": "linear_attention", "feature_map": "favor", "features": 12},
    "window": {"type": "linear_attention", "feature_map": "hedgehog", "window": 2},
    "gla": {"type": "gla"},
    "gated_deltanet": {"type": "gated_deltanet"},
    "mamba": {"type": "mamba", "transfer": ["mlp"]},
    "mamba2": {"type": "mamba2"},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_generation_from_padded_prompts_is_llamas(
    load: Callable[..., Any], load_source: Callable[..., Any], tokens: Tensor, mask: Any, options: dict[str, Any]
) -> None:
    wanted, found = (
        model.generate(
            tokens[:, :4],
            attention_mask=torch.tensor(mask),
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        for model in (load_source(), load())
    )
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("is_packed", [None, False, True])
@torch.no_grad()
def test_states_after_a_padded_prompt_are_those_of_each_row_alone(
    load: Callable[..., Any], tokens: Tensor, kind: str, mask: Any, is_packed: bool | None
) -> None:
    model = load("llama", {"mixers": [{**MIXERS[kind], "depths": "all", "except": [1]}]})
    real = torch.tensor(mask)
    cache, rows = DynamicCache(config=model.config), tokens[:, :7]
    places = (real.cumsum(1) - 1).clamp(min=0)
    given: Any = {"past_key_values": cache, "is_packed": is_packed}
    found = [model(rows[:, :4], attention_mask=real, position_ids=places, **given).logits]
    for step in range(4, 7):
        real = torch.cat((real, real.new_ones(2, 1)), dim=1)
        place = real.sum(1, keepdim=True) - 1
        one = rows[:, step : step + 1]
        found.append(model(one, attention_mask=real, position_ids=place, **given).logits)
    for row, (padded, is_real) in enumerate(zip(torch.cat(found, dim=1), real.bool(), strict=True)):
        alone = model(rows[row : row + 1, is_real]).logits[0]
        torch.testing.assert_close(padded[is_real], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_holes_without_a_cache_change_no_token(load: Callable[..., Any], tokens: Tensor) -> None:
    model = load("llama", {"mixers": [{"type": "retention", "depths": "all"}]})
    mask = torch.tensor(MASKS["holes"])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(tokens[:, :4], attention_mask=mask, position_ids=places, use_cache=False).logits
    for row in range(2):
        alone = model(tokens[row : row + 1, :4][:, mask[row].bool()]).logits[0]
        torch.testing.assert_close(found[row, mask[row].bool()], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_mask_of_one_call_does_not_empty_the_state_of_earlier_ones(load: Callable[..., Any], tokens: Tensor) -> None:
    model = load("llama", {"mixers": [{"type": "retention", "depths": "all"}]})
    expected = model(tokens[:, :6]).logits[:, 4:]
    for is_packed in (None, False):
        cache = DynamicCache(config=model.config)
        model(tokens[:, :4], past_key_values=cache)
        given: Any = {"past_key_values": cache, "is_packed": is_packed}
        found = model(tokens[:, 4:6], attention_mask=torch.ones(2, 2, dtype=torch.long), **given).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    anew = model(tokens[:, 4:6]).logits
    assert (anew - expected).abs().max() > 1e-2


@torch.no_grad()
def test_padding_after_the_tokens_of_an_earlier_call_is_refused(load: Callable[..., Any], tokens: Tensor) -> None:
    model = load("llama", {"mixers": [{"type": "retention", "depths": "all"}]})
    cache = DynamicCache(config=model.config)
    model(tokens[:, :4], past_key_values=cache)
    mask = torch.tensor([[1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])
    with pytest.raises(RefoldError, match="padding before the tokens of a row is required"):
        model(tokens[:, 4:6], attention_mask=mask, past_key_values=cache)


def test_a_row_whose_position_reaches_back_over_padding_stays_one_document() -> None:
    mask = torch.tensor([[1, 0, 0, 0, 1], [1, 1, 0, 0, 1]])
    found = document_starts(torch.tensor([[1], [1]]), mask, 4)
    assert found is not None
    assert found.tolist() == [[0], [0]]


def test_packed_documents_stay_apart_beside_padding() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    found = document_starts(torch.tensor([[0, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1]]), mask, 0)
    assert found is not None
    assert found[mask.bool()].tolist() == [0, 0, 2, 2, 0, 0, 4, 4]
    later = document_starts(torch.tensor([[2], [2]]), torch.ones(2, 5), 4)
    assert later is not None
    assert later.tolist() == [[2], [2]]


def test_only_the_first_token_of_a_padded_row_empties_its_state() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]])
    assert padding_first(mask, 0, 4, has_cache=True) is not None
    assert padding_first(torch.tensor([[1, 1, 0], [0, 1, 1]]), 0, 3, has_cache=False) is None
    resets = state_resets(None, torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 1]]), 4, 1)
    assert resets is not None
    assert resets.tolist() == [[False], [True]]
