"""Arguments of transformers' loss function reach it, as they do in transformers' Llama."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

LABELS = torch.randint(2, 95, (2, 24), generator=torch.Generator().manual_seed(8))
ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shifted": {"shift_labels": LABELS.roll(-3, 1)},
    "items": {"num_items_in_batch": 7},
    "items of a tensor": {"num_items_in_batch": torch.tensor(7)},
    "another index": {"ignore_index": 5},
    "all": {"shift_labels": LABELS.masked_fill(LABELS < 40, 5), "num_items_in_batch": 11, "ignore_index": 5},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@torch.no_grad()
def test_the_loss_is_llamas(
    load: Callable[..., Any], load_source: Callable[..., Any], tokens: Tensor, arguments: dict[str, Any]
) -> None:
    labels = LABELS.masked_fill(LABELS < 20, arguments.get("ignore_index", -100))
    wanted, found = (model(tokens, labels=labels, **arguments).loss for model in (load_source(), load()))
    torch.testing.assert_close(found, wanted)
    if arguments:
        assert not torch.isclose(found, load()(tokens, labels=labels).loss)


@torch.no_grad()
def test_a_loss_function_of_ones_own_is_given_its_arguments(load: Callable[..., Any], tokens: Tensor) -> None:
    model, seen = load(), {}

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        seen.update(kwargs)
        return logits.sum() * 0 + vocab_size

    model.loss_function = loss
    assert float(model(tokens, labels=tokens, weight_of="each").loss) == 96
    assert seen["weight_of"] == "each"
