"""Models and heads cut to kept tokens have the renormalised probabilities of the whole."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from refold.errors import SourceError
from refold.scoring.head import Head
from refold.vocabulary.kept_tokens import KeptTokens
from refold.vocabulary.rows import cut_head, cut_model


@pytest.mark.parametrize("variant", ["llama", "gemma", "gpt_neox"])
def test_a_cut_model_has_the_logits_of_kept_tokens(variant, make_source):
    source = make_source(variant, vocab_size=96)
    whole, cut = (AutoModelForCausalLM.from_pretrained(source).eval() for _ in range(2))
    kept = KeptTokens(np.array([*range(0, 96, 2), 95]), 96)
    cut = cut_model(cut, kept)
    new = torch.tensor([[1, 7, 3, 40, 48]])
    with torch.no_grad():
        expected = whole(kept.to_source(new)).logits[..., torch.from_numpy(kept.ids)]
        found = cut(new).logits
    assert torch.equal(found, expected)
    assert cut.config.vocab_size == kept.size
    is_tied = whole.config.tie_word_embeddings
    head: Any = cut.get_output_embeddings()
    assert (head.weight is cut.get_input_embeddings().weight) == is_tied
    with pytest.raises(SourceError, match=r"a model with a vocabulary of 96 tokens is required .got 49"):
        cut_model(cut, kept)


def test_a_cut_head_keeps_bias_scale_softcap_and_lora():
    numbers = torch.Generator().manual_seed(0)
    made = [
        torch.randn(*shape, generator=numbers, dtype=torch.float64) for shape in ((9, 4), (9,), (2, 4), (9, 2), (5, 4))
    ]
    head = Head(made[0], made[1], 0.7, 3.0, (made[2], made[3]))
    kept = KeptTokens(np.array([1, 2, 8]), 9)
    assert torch.allclose(cut_head(head, kept).logits(made[4]), head.logits(made[4])[:, [1, 2, 8]], atol=1e-15)
