"""Measures of confidence against their formulas."""

import math

import pytest
import torch

from refold.engine.confidence import MEASURES, compares_exits, confidence, reads_gate
from refold.errors import RefoldError

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.5, 0.5, 0.5, 0.5], [-3.0, 40.0, 0.0, 1.0]])
P = LOGITS.double().softmax(-1)


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("top1", P.max(-1).values),
        ("margin", P.sort(-1).values[:, -1] - P.sort(-1).values[:, -2]),
        ("entropy", 1 + (P * P.log()).sum(-1) / math.log(4)),
    ],
)
def test_a_measure_of_logits_is_its_formula(measure, expected):
    found = confidence(measure, LOGITS, None)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert found.dtype == torch.float32
    assert not torch.allclose(found.double(), P.min(-1).values, atol=1e-3)


def test_a_gate_gives_its_sigmoid_for_rows_and_for_texts():
    gate = torch.tensor([[-2.0, 0.0, 3.0]])
    torch.testing.assert_close(confidence("gate", gate, None), 1 / (1 + (-gate).exp()))
    assert confidence("gate", gate[0].bfloat16(), None).dtype == torch.float32


def test_agreement_asks_the_exit_before_and_never_agrees_at_the_first():
    previous = torch.tensor([0, 3, -1])
    assert confidence("agreement", LOGITS, previous).tolist() == [1, 0, 0]
    assert confidence("agreement", LOGITS, None).tolist() == [0, 0, 0]


def test_tokens_without_probability_do_not_make_entropy_undefined():
    masked = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf], [5.0, *[-torch.inf] * 3]])
    torch.testing.assert_close(confidence("entropy", masked, None), torch.tensor([0.5, 1.0]))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_every_measure_lies_between_0_and_1_and_takes_any_shape(measure, scale):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(2, 3, 50, generator=generator)
    outputs = logits[..., 0] if reads_gate(measure) else logits
    found = confidence(measure, outputs, torch.zeros(2, 3, dtype=torch.int64))
    assert found.shape == (2, 3)
    assert ((found >= 0) & (found <= 1)).all()


def test_only_some_measures_read_gates_or_other_exits():
    assert [measure for measure in MEASURES if reads_gate(measure)] == ["gate"]
    assert [measure for measure in MEASURES if compares_exits(measure)] == ["agreement"]


def test_an_unknown_measure_is_refused_with_the_nearest_name():
    with pytest.raises(RefoldError, match=r"measure: .*entropy"):
        confidence("entropie", LOGITS, None)
