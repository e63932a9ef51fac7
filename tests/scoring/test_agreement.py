import math
from dataclasses import replace

import pytest
import torch

from refold.errors import DataError, SourceError
from refold.scoring.agreement import Scores, bits_per_byte, likeliest_tokens, perplexity, score, token_scores
from refold.scoring.head import Head, Predictions

VOCAB = 37


def _case(dtype: torch.dtype = torch.float64) -> tuple[Predictions, Predictions, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    model = Predictions(draw(3, 9, 8), Head(draw(VOCAB, 8), draw(VOCAB), softcap=6.0))
    reference = Predictions(draw(3, 9, 5), Head(draw(VOCAB, 5), scale=0.7))
    labels = torch.randint(VOCAB, (3, 9), generator=generator)
    labels[:, ::4] = -100
    return model, reference, labels


def _naive(model: Predictions, reference: Predictions, labels: torch.Tensor) -> Scores:
    kept = labels != -100
    log_q = model.head.logits(model.hidden.double())[kept].double().log_softmax(-1)
    log_p = reference.head.logits(reference.hidden.double())[kept].double().log_softmax(-1)
    return Scores(
        nll=float(-log_q[torch.arange(len(log_q)), labels[kept]].sum()),
        num_tokens=int(kept.sum()),
        num_correct=int((log_q.argmax(-1) == labels[kept]).sum()),
        num_compared=int(kept.sum()),
        num_agreeing=int((log_q.argmax(-1) == log_p.argmax(-1)).sum()),
        kl=float((log_p.exp() * (log_p - log_q)).sum()),
    )


@pytest.mark.parametrize("positions_per_chunk", [1, 5, 1000])
def test_sums_are_those_of_full_logits(positions_per_chunk: int):
    model, reference, labels = _case()
    found = score(model, labels, reference=reference, chunk_bytes=positions_per_chunk * VOCAB * 8)
    expected = _naive(model, reference, labels)
    assert found.nll == pytest.approx(expected.nll, rel=1e-12)
    assert found.kl == pytest.approx(expected.kl, rel=1e-12)
    for name in ("num_tokens", "num_correct", "num_compared", "num_agreeing"):
        assert getattr(found, name) == getattr(expected, name)
    assert 0 < found.num_tokens < labels.numel()


def test_dropping_the_softcap_shows():
    model, _, labels = _case()
    uncapped = Predictions(model.hidden, Head(model.head.weight, model.head.bias))
    assert score(uncapped, labels).nll != pytest.approx(score(model, labels).nll, rel=1e-2)


def test_bfloat16_scores_are_near_double():
    model, _, labels = _case(torch.bfloat16)
    head = Head(model.head.weight, softcap=6.0)
    exact = score(Predictions(model.hidden.double(), replace(head, weight=head.weight.double())), labels)
    assert score(Predictions(model.hidden, head), labels).nll == pytest.approx(exact.nll, rel=1e-2)


def test_a_model_agrees_with_itself():
    model, _, labels = _case()
    found = score(model, labels, reference=model)
    assert found.agreement == 1
    assert found.mean_kl == pytest.approx(0, abs=1e-12)


def test_token_scores_stand_at_their_positions():
    model, reference, labels = _case()
    scores = token_scores(model, labels, reference=reference)
    one = token_scores(Predictions(model.hidden[1, 2], model.head), labels[1, 2])
    assert scores.nll.shape == labels.shape
    assert float(scores.nll[1, 2]) == pytest.approx(float(one.nll))
    assert scores.kl is not None
    assert scores.agrees is not None
    assert not scores.nll[:, ::4].any()
    assert not scores.kl[:, ::4].any()
    assert not scores.agrees[:, ::4].any()
    assert (scores.nll[:, 1:4] > 0).all()


def test_nothing_scored_adds_nothing_and_no_gradient_is_kept():
    model, reference, labels = _case()
    hidden = model.hidden.clone().requires_grad_()
    assert score(Predictions(hidden, model.head), torch.full_like(labels, -100), reference=reference) == Scores()
    assert not token_scores(Predictions(hidden, model.head), labels).nll.requires_grad


def test_scores_add_up_over_batches():
    model, reference, labels = _case()
    parts = [
        score(
            Predictions(model.hidden[row], model.head),
            labels[row],
            reference=Predictions(reference.hidden[row], reference.head),
        )
        for row in range(3)
    ]
    total, whole = sum(parts, Scores()), score(model, labels, reference=reference)
    assert total.nll == pytest.approx(whole.nll)
    assert total.kl == pytest.approx(whole.kl)
    assert (total.num_tokens, total.num_agreeing) == (whole.num_tokens, whole.num_agreeing)


def test_ratios_are_of_their_own_counts():
    scores = Scores(nll=8 * math.log(2), num_tokens=4, num_correct=1, num_compared=2, num_agreeing=1, kl=0.5)
    assert scores.perplexity == pytest.approx(4)
    assert scores.bits_per_byte(16) == pytest.approx(0.5)
    assert (scores.accuracy, scores.agreement, scores.mean_kl) == (0.25, 0.5, 0.25)


def test_perplexity_beyond_floats_is_infinite():
    assert perplexity(1e6, 1) == math.inf


def test_empty_counts_are_refused():
    with pytest.raises(DataError, match=r"at least one byte of text is required \(got 0\)"):
        bits_per_byte(1.0, 0)
    with pytest.raises(DataError, match="at least one scored token is required"):
        perplexity(1.0, 0)
    with pytest.raises(DataError, match="at least one token compared with a reference is required"):
        _ = Scores(nll=1.0, num_tokens=1).agreement


def test_another_vocabulary_is_refused():
    model, _, labels = _case()
    with pytest.raises(SourceError, match="share one vocabulary"):
        score(model, labels, reference=Predictions(model.hidden, Head(torch.ones(5, 8))))


@pytest.mark.parametrize("positions_per_chunk", [1, 5, 100])
def test_likeliest_tokens_are_those_of_all_logits_where_a_label_counts(positions_per_chunk):
    model, _, labels = _case()
    found = likeliest_tokens(model, labels, chunk_bytes=positions_per_chunk * 4 * VOCAB)
    expected = model.head.logits(model.hidden).argmax(-1)
    assert torch.equal(found, torch.where(labels == -100, -100, expected))
    everywhere = torch.zeros_like(labels)
    assert torch.equal(likeliest_tokens(model, everywhere), expected)
