"""Distillation from a running teacher, and from its stored predictions."""

import pytest
import torch
from torch.nn import functional as F

from refold.healing.activations import Want, observe
from refold.healing.objectives.distil import Distil
from refold.healing.objectives.objective import Step
from refold.recipe import objectives as specs
from refold.scoring.stored import likeliest

STRICT = {"fold": {"loops": 2, "init": "stepwise"}}
PREDICTIONS = frozenset[Want]({"predictions"})


def make_step(student, teacher, documents, k=None) -> Step:
    inputs = documents.input_ids, documents.position_ids
    with torch.no_grad():
        theirs = observe(teacher, *inputs, PREDICTIONS)
    stored = None if k is None else likeliest(theirs.predictions, k)
    ours = observe(student, *inputs, PREDICTIONS)
    return Step(student, *inputs, documents.labels, documents.num_tokens, ours, None if k else theirs, stored)


def test_it_asks_for_a_teacher_or_for_what_is_stored_of_it():
    along, stored = Distil(specs.DistilOptions()), Distil(specs.DistilOptions(top_k=4))
    assert (along.student_wants, along.teacher_wants, along.stored_top_k) == (PREDICTIONS, PREDICTIONS, None)
    assert (stored.student_wants, stored.teacher_wants, stored.stored_top_k) == (PREDICTIONS, frozenset(), 4)


def test_the_loss_is_that_of_full_logits(fold, load_source, documents):
    student, teacher = fold(recipe=STRICT), load_source(attn="sdpa")
    options = specs.DistilOptions(cross_entropy=0.3, divergence_weight=0.7)
    found = Distil(options).loss(make_step(student, teacher, documents))
    mask = {"attention_mask": documents.mask, "use_cache": False, "position_ids": documents.position_ids}
    logits, target = (model(documents.input_ids, **mask).logits[documents.scored] for model in (student, teacher))
    kl = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
    cross_entropy = F.cross_entropy(logits, documents.labels[documents.scored])
    torch.testing.assert_close(found.means, {"cross_entropy": cross_entropy.detach(), "forward_kl": kl.detach()})
    torch.testing.assert_close(found.total, 0.3 * cross_entropy + 0.7 * kl)


@pytest.mark.parametrize("k", [8, 96])
def test_stored_predictions_stand_in_for_the_teacher(fold, load_source, documents, k):
    teacher = load_source()
    losses, gradients = [], []
    for stored in (None, k):
        student = fold(recipe=STRICT)
        loss = Distil(specs.DistilOptions(top_k=stored)).loss(make_step(student, teacher, documents, stored))
        loss.total.backward()
        losses.append(loss.total.detach())
        gradients.append(student.model.mixers[0].q_proj.weight.grad)
    assert gradients[0].abs().max() > 1e-3
    is_whole = torch.allclose(losses[1], losses[0]) and torch.allclose(gradients[1], gradients[0], rtol=1e-4)
    assert is_whole == (k == 96)
    assert losses[1] < losses[0] + 1e-9
