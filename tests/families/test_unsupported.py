"""Errors for unsupported architectures name their kind and suggest no misleading family."""

import pytest

from refold.errors import SourceError
from refold.families.registry import FAMILIES, read_arch
from refold.families.unsupported import REASONS


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "mixtral"}, "a mixture of experts"),
        ({"model_type": "deepseek_v3"}, "a mixture of experts"),
        ({"model_type": "newmodel", "num_experts": 8}, "a mixture of experts"),
        ({"model_type": "mamba"}, "a recurrent or hybrid model"),
        ({"model_type": "bert"}, "an encoder: it predicts no next token"),
        ({"model_type": "newbert", "architectures": ["NewForMaskedLM"]}, "an encoder: it predicts no next token"),
        ({"model_type": "t5"}, "an encoder-decoder"),
        ({"model_type": "newseq", "is_encoder_decoder": True}, "an encoder-decoder"),
        ({"model_type": "gpt2"}, "a decoder whose tensor names refold does not know yet"),
        ({"model_type": "llava"}, "not a text-only model"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_the_reason_is_told_and_no_other_name_suggested(config: dict, says: str) -> None:
    with pytest.raises(
        SourceError, match=rf"model_type: must be one of llama, .* \(got '{config['model_type']}', {says}"
    ) as told:
        read_arch(config)
    assert "did you mean" not in str(told.value)


@pytest.mark.parametrize(("name", "close"), [("lama", "llama"), ("Qwen2", "qwen2"), ("mistrall", "mistral")])
def test_a_slip_of_the_pen_is_mended(name: str, close: str) -> None:
    with pytest.raises(SourceError, match=rf"got '{name}'\); did you mean '{close}'"):
        read_arch({"model_type": name})


@pytest.mark.parametrize("name", ["solar", ["llama"], {}, None, 3, ""])
def test_nothing_is_suggested_for_a_name_like_none(name: object) -> None:
    with pytest.raises(SourceError, match="must be one of") as told:
        read_arch({"model_type": name})
    assert "did you mean" not in str(told.value)


def test_no_family_is_refused() -> None:
    assert not set(REASONS) & set(FAMILIES)
