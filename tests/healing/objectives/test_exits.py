"""Early exits learn from the full depth, against definitions on all logits in float64."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from refold.conversion.convert import ConvertOptions, convert
from refold.errors import HealError
from refold.healing.activations import observe
from refold.healing.objectives import exits as module
from refold.healing.objectives.exits import Exits
from refold.healing.objectives.objective import Loss, Step
from refold.modeling.load import load_model
from refold.recipe import objectives as specs
from refold.scoring.chunked import chunked_loss

OWN = {"norm": "own", "head_rank": 3, "gate": True}
POSITIONS = torch.cat((torch.arange(7), torch.arange(9))).expand(2, -1)


@pytest.fixture(scope="module")
def folders(make_source, tmp_path_factory):
    made = {}
    for name, exits in (("shared", {"at": [0, 2]}), ("own", {"at": [0, 2], **OWN}), ("none", None)):
        made[name] = tmp_path_factory.mktemp("folded") / name
        recipe = {"fold": {"loops": 2}, "relax": {"rank": 3}, **({"exits": exits} if exits else {})}
        convert(
            make_source("llama", tie_word_embeddings=True),
            made[name],
            recipe,
            options=ConvertOptions(allow_larger=True),
        )
    return made


@pytest.fixture
def make_model(folders):
    def make(name: str = "own", visible: bool = True) -> Any:
        model = load_model(folders[name], device="cpu", dtype=torch.float64)
        generator = torch.Generator().manual_seed(2)
        for weight in model.model.exits.parameters() if visible else ():
            weight.data.add_(torch.randn(weight.shape, generator=generator) / 2)
        return model

    return make


@pytest.fixture(scope="module")
def rows() -> tuple[Tensor, Tensor]:
    """Tokens and labels of two rows with two documents each; some positions do not count."""
    tokens = torch.randint(2, 95, (2, 16), generator=torch.Generator().manual_seed(4))
    labels = torch.cat((tokens[:, 1:], torch.full((2, 1), -100)), dim=1)
    labels[:, 6] = -100
    labels[0, 10:12] = -100
    return tokens, labels


def run(objective: Exits, model: Any, rows: tuple[Tensor, Tensor], num_tokens: int | None = None) -> Loss:
    tokens, labels = rows
    objective.check(model, None)
    positions = POSITIONS[: len(tokens)]
    student = observe(model, tokens, positions, objective.student_wants)
    count = int((labels != -100).sum()) if num_tokens is None else num_tokens
    return objective.loss(Step(model, tokens, positions, labels, count, student, None))


def naive(model: Any, rows: tuple[Tensor, Tensor], coefficients: list[float], target: str, gates: float) -> Tensor:
    """All logits of the model itself, the losses as they are defined, autograd."""
    tokens, labels = rows
    out = model(tokens, position_ids=POSITIONS, output_exits=True)
    kept = labels != -100
    final = out.logits[kept]
    total = coefficients[-1] * F.cross_entropy(final, labels[kept])
    for coefficient, logits in zip(coefficients[:-1], out.exit_logits, strict=True):
        q = logits[kept].softmax(-1)
        if target == "labels":
            total = total - coefficient * q.gather(1, labels[kept][:, None]).log().mean()
        else:
            p = final.detach().softmax(-1)
            total = total + coefficient * (p * (p.log() - q.log())).sum(-1).mean()
    for gate, logits in zip(out.exit_gates or (), out.exit_logits, strict=False):
        agrees = (logits.argmax(-1) == out.logits.argmax(-1))[kept].double()
        says = gate[kept].sigmoid()
        total = total - gates * (agrees * says.log() + (1 - agrees) * (1 - says).log()).mean()
    return total


def gradients(loss: Tensor, model: Any) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    parts = zip(names, weights, found, strict=True)
    return {name: torch.zeros_like(weight) if grad is None else grad for name, weight, grad in parts}


CASES = [
    ({}, [0.1, 0.1, 1.0], 1.0),
    ({"coefficient": 0.7, "target": "labels", "gate_weight": 0.3, "cross_entropy": 0.4}, [0.7, 0.7, 0.4], 0.3),
    ({"weights": "weighted"}, [1 / 6, 2 / 6, 3 / 6], 1.0),
    ({"weights": "weighted", "target": "labels", "cross_entropy": 0}, [1 / 6, 2 / 6, 0.0], 1.0),
]


@pytest.mark.parametrize("chunk_positions", [3, 1000])
@pytest.mark.parametrize("name", ["shared", "own"])
@pytest.mark.parametrize(("options", "coefficients", "gates"), CASES)
def test_loss_and_gradients_are_those_of_full_logits(
    make_model, rows, monkeypatch, name, options, coefficients, gates, chunk_positions
):
    def small_chunks(*given: Any, **keywords: Any) -> Any:
        return chunked_loss(*given, **keywords, chunk_bytes=chunk_positions * 4 * 2 * 96)

    monkeypatch.setattr(module, "chunked_loss", small_chunks)
    model = make_model(name)
    options = specs.ExitsOptions.model_validate(options)
    found = run(Exits(options), model, rows)
    expected = naive(model, rows, coefficients, options.target, gates)
    torch.testing.assert_close(found.total, expected)
    theirs = gradients(expected, model)
    ours = gradients(found.total, model)
    for weight, gradient in theirs.items():
        torch.testing.assert_close(ours[weight], gradient, msg=lambda told, weight=weight: f"{weight}: {told}")
    assert sum(float(gradient.abs().max()) > 1e-4 for gradient in theirs.values()) > 20


def test_the_parts_are_told_unweighted(make_model, rows):
    tokens, labels = rows
    model = make_model()
    found = run(Exits(specs.ExitsOptions(coefficient=0.3)), model, rows)
    assert set(found.means) == {
        "cross_entropy",
        *(f"exit_{depths}_{part}" for depths in (1, 3) for part in ("cross_entropy", "forward_kl", "agreement")),
        "gate_1",
        "gate_3",
    }
    assert not any(mean.requires_grad for mean in found.means.values())
    out = model(tokens, position_ids=POSITIONS, output_exits=True)
    kept = labels != -100
    left = F.cross_entropy(out.exit_logits[1][kept], labels[kept])
    torch.testing.assert_close(found.means["exit_3_cross_entropy"], left.detach())
    agrees = (out.exit_logits[1].argmax(-1) == out.logits.argmax(-1))[kept].double().mean()
    torch.testing.assert_close(found.means["exit_3_agreement"], agrees)


def test_the_exits_pull_does_not_reach_the_final_distribution(make_model, rows):
    """Depth 3 and the final norm come after the last exit: an exit's loss must not move them."""
    model = make_model()
    alone = gradients(run(Exits(specs.ExitsOptions(cross_entropy=0, coefficient=1)), model, rows).total, model)
    after = ["model.norm.weight", *(name for name in alone if name.startswith("model.depths.3."))]
    assert len(after) > 10
    assert not any(alone[name].any() for name in after)
    assert alone["model.depths.2.lora.q_proj.b"].any()
    assert alone["model.embed_tokens.weight"].any()
    # With a target that is not detached it would.
    out = model(rows[0], position_ids=POSITIONS, output_exits=True)
    distance = {"log_target": True, "reduction": "batchmean"}
    leaking = F.kl_div(out.exit_logits[0].log_softmax(-1), out.logits.log_softmax(-1), **distance)
    assert gradients(leaking, model)["model.norm.weight"].any()


def test_micro_batches_add_up(make_model, rows):
    model, objective = make_model(), Exits(specs.ExitsOptions())
    count = int((rows[1] != -100).sum())
    whole = run(objective, model, rows)
    parts = [run(objective, model, (rows[0][row : row + 1], rows[1][row : row + 1]), count) for row in range(2)]
    torch.testing.assert_close(parts[0].total + parts[1].total, whole.total)
    for name, mean in whole.means.items():
        torch.testing.assert_close(parts[0].means[name] + parts[1].means[name], mean)


def test_gates_may_train_alone(make_model, rows):
    model = make_model()
    found = run(Exits(specs.ExitsOptions(cross_entropy=0, coefficient=0)), model, rows)
    moved = {name for name, gradient in gradients(found.total, model).items() if gradient.any()}
    assert moved == {f"model.exits.{index}.gate.{kind}" for index in (0, 2) for kind in ("weight", "bias")}
    found = run(Exits(specs.ExitsOptions(gate_weight=0)), model, rows)
    assert not any(name.startswith("gate") for name in found.means)


def train(objective: Exits, model: Any, rows: tuple[Tensor, Tensor], steps: int, rate: float) -> list[dict[str, float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        found = run(objective, model, rows)
        found.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append({name: float(mean) for name, mean in found.means.items()})
    return losses


def test_training_lowers_the_losses_of_exits(make_model, rows):
    losses = train(Exits(specs.ExitsOptions(coefficient=0.5)), make_model(visible=False).float(), rows, 25, 3e-3)
    for name in ("cross_entropy", "exit_1_forward_kl", "exit_1_cross_entropy", "exit_3_forward_kl"):
        assert losses[-1][name] < 0.8 * losses[0][name]


def test_trained_gates_tell_where_an_exit_agrees(make_model, rows):
    model = make_model(visible=False).float()
    losses = train(Exits(specs.ExitsOptions(cross_entropy=0, coefficient=0)), model, rows, 60, 0.1)
    assert losses[0]["gate_3"] == pytest.approx(0.6931, abs=1e-3)
    share = losses[0]["exit_3_agreement"]
    assert 0 < share < 1
    assert losses[-1]["exit_3_agreement"] == share
    guess = -(share * math.log(share) + (1 - share) * math.log(1 - share))
    assert losses[-1]["gate_3"] < 0.5 * guess


def test_a_model_without_exits_is_refused(make_model, rows):
    with pytest.raises(HealError, match="objective exits: a model with exits is required"):
        run(Exits(specs.ExitsOptions()), make_model("none"), rows)


def test_nothing_to_learn_is_refused(make_model, rows):
    nothing = Exits(specs.ExitsOptions(cross_entropy=0, coefficient=0))
    nothing.check(make_model("own"), None)
    with pytest.raises(HealError, match=r"objective exits: something to learn is required \(coefficient and"):
        run(nothing, make_model("shared"), rows)


def test_a_coefficient_that_is_not_used_is_refused():
    with pytest.raises(ValidationError, match=r"coefficient: requires weights aggressive \(got 0.2 with weighted\)"):
        specs.ExitsOptions(weights="weighted", coefficient=0.2)
    assert specs.ExitsOptions.model_validate(specs.ExitsOptions(weights="weighted").model_dump()).weights == "weighted"
