"""Branches off: a branch that writes nothing changes nothing, and losses are those of the model without it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refold.conversion.convert import ConvertOptions, convert
from refold.modeling.model import RefoldForCausalLM
from refold.scorecard.branches import Branch, branch_off, find_branches, measure_branches
from refold.scorecard.job import ScoreJob, SectionNotRun

HYBRID = {"mixers": [{"type": "gated_deltanet", "depths": [0, 2, 3]}]}
TWO_BRANCHES = {"mixers": [{"type": "linear_attention", "window": 6}]}
LOOPED = {"fold": {"loops": 2}, "mixers": [{"type": "linear_attention", "window": 6}]}


@pytest.fixture(scope="module")
def make_fold(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(recipe: dict[str, Any]) -> Path:
        folder = tmp_path_factory.mktemp("branches") / "fold"
        convert(make_model("llama"), folder, recipe, options=ConvertOptions(allow_larger=True))
        return folder

    return make


@pytest.fixture(scope="module")
def hybrid(make_fold: Callable[..., Path]) -> Path:
    return make_fold(HYBRID)


@pytest.fixture(scope="module")
def windowed(make_fold: Callable[..., Path]) -> Path:
    return make_fold(TWO_BRANCHES)


@pytest.fixture
def job_of(make_job: Callable[..., ScoreJob], texts: list[str]) -> Callable[[Path], ScoreJob]:
    return lambda folder: make_job(folder, texts, documents=4, opening=40)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 43)[None]).logits


def silence(model: Any, depth: int) -> None:
    """Zeroes the output weights of the mixer at a depth."""
    mixer = model.model.parts_of(model.model.depths[depth]).mixer
    (weight,) = (each for name, each in mixer.named_parameters() if name.endswith("o_proj.weight"))
    weight.data.zero_()


def test_every_kind_and_every_depth_is_turned_off(hybrid: Path, job_of: Callable[[Path], ScoreJob]) -> None:
    found = measure_branches(job_of(hybrid))
    names = ["all attention", "all gated_deltanet", *(f"depth {at}: gated_deltanet" for at in (0, 2, 3))]
    assert [each.branch for each in found] == names
    for each in found:
        assert each.num_documents == 4
        assert each.difference != 0.0
        assert each.difference_error is not None
        # All differences are against the same loss of the whole model.
        assert each.bits_per_byte - each.difference == pytest.approx(found[0].bits_per_byte - found[0].difference)


def test_a_mixer_that_writes_nothing_makes_no_difference(hybrid: Path, job_of: Callable[[Path], ScoreJob]) -> None:
    job = job_of(hybrid)
    model: Any = job.subject.model
    silence(model, 1)
    found = {each.branch: each for each in measure_branches(job)}
    assert found["all attention"].difference == found["all attention"].difference_error == 0.0
    assert found["all gated_deltanet"].difference != 0.0


def test_a_mixer_off_is_the_model_whose_mixer_writes_nothing(hybrid: Path, job_of: Callable[[Path], ScoreJob]) -> None:
    model: Any = job_of(hybrid).subject.model
    whole = logits(model)
    with branch_off(model, Branch("depth 2", (2,))):
        off = logits(model)
    # The hooks are gone.
    assert torch.equal(logits(model), whole)
    silence(model, 2)
    torch.testing.assert_close(off, logits(model))
    assert not torch.allclose(off, whole)


def test_a_dropped_branch_is_an_infinite_blend(windowed: Path, job_of: Callable[[Path], ScoreJob]) -> None:
    model: Any = job_of(windowed).subject.model
    whole = logits(model)
    groups = [branch for branch in find_branches(model, 16) if branch.name.startswith("all")]
    assert [branch.name for branch in groups] == ["all linear_attention: window", "all linear_attention: features"]
    off = {}
    for branch in groups:
        with branch_off(model, branch):
            off[branch.part] = logits(model)
    for part, blend in (("window", -torch.inf), ("features", torch.inf)):
        assert not torch.allclose(off[part], whole)
        for name, tensor in model.named_parameters():
            if name.endswith("blend.share"):
                tensor.data.fill_(blend)
        torch.testing.assert_close(off[part], logits(model))


def test_a_window_alone_is_windowed_softmax_attention(
    windowed: Path, make_fold: Callable[..., Path], job_of: Callable[[Path], ScoreJob]
) -> None:
    model: Any = job_of(windowed).subject.model
    other: Any = job_of(make_fold({"mixers": [{"type": "attention", "window": 6}]})).subject.model
    with branch_off(model, Branch("features", (0, 1, 2, 3), "features")):
        torch.testing.assert_close(logits(model), logits(other), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(model), logits(other), rtol=1e-3, atol=1e-3)


def test_one_depth_of_a_tied_mixer_is_off_alone(
    make_fold: Callable[..., Path], job_of: Callable[[Path], ScoreJob]
) -> None:
    model: Any = job_of(make_fold(LOOPED)).subject.model
    assert isinstance(model, RefoldForCausalLM)
    assert len(model.model.mixers) == 2
    found = {}
    for depths in ((0,), (2,), (0, 2)):
        with branch_off(model, Branch("window", depths, "window")):
            found[depths] = logits(model)
    kept = list(found.values())
    assert not any(torch.allclose(one, other) for one, other in ((kept[0], kept[1]), (kept[0], kept[2])))
    seen = np.array([float((each - logits(model)).abs().max()) for each in kept])
    assert (seen > 0).all()


def test_single_depths_are_limited(hybrid: Path, job_of: Callable[[Path], ScoreJob]) -> None:
    model: Any = job_of(hybrid).subject.model
    assert [each.name for each in find_branches(model, 1)] == [
        "all attention",
        "all gated_deltanet",
        "depth 0: gated_deltanet",
    ]


def test_what_is_missing_is_named(
    hybrid: Path, make_model: Callable[..., Path], make_fold: Callable[..., Path], make_job: Callable[..., ScoreJob]
) -> None:
    with pytest.raises(SectionNotRun, match=r"a folded model .* is required \(got llama\)"):
        measure_branches(make_job(make_model("llama"), ["text"]))
    with pytest.raises(SectionNotRun, match=r"a hybrid is required.*all 4 depths have attention"):
        measure_branches(make_job(make_fold({}), ["text"]))
    with pytest.raises(SectionNotRun, match="held-out text is required"):
        measure_branches(make_job(hybrid))
