"""Measures besides losses on text: task scores, speed, and recorded throughput."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refold.claims import tasks
from refold.claims.claim import ClaimArm, ClaimNotRun
from refold.claims.tasks import SpeedRatio, TaskShare, task_samples
from refold.claims.throughput import RecordedThroughput
from refold.scorecard.record import NotRun, Scorecard, SpeedSection, TaskScore, TaskSection

ARM = ClaimArm("hybrid", {})


def section(chances: dict[str, float], seed: int, num_items: int = 200) -> TaskSection:
    """Scores of drawn answers; an item is as hard for every model."""
    scores = []
    for index, (name, chance) in enumerate(chances.items()):
        hard = np.random.default_rng(index).uniform(size=num_items)
        moved = np.clip(hard + np.random.default_rng([seed, index]).normal(0, 0.05, num_items), 0, 1)
        right = tuple((moved < chance).astype(float).tolist())
        fields: dict[str, Any] = {"metric": "acc", "error": None, "chance": 0.5, "metrics": {}, "shots": 0}
        scores.append(
            TaskScore(
                name=name,
                value=float(np.mean(right)),
                num_items=num_items,
                num_available=num_items,
                version="1",
                items=tuple(map(str, range(num_items))),
                right=right,
                **fields,
            )
        )
    average = float(np.mean([score.value for score in scores]))
    return TaskSection(tasks=tuple(scores), average=average, average_error=None, harness="made", seconds=0.0)


def bench(**options: Any) -> Any:
    def require(name: str, advice: str) -> Any:
        if name not in options:
            raise ClaimNotRun(advice)
        return options[name]

    return SimpleNamespace(
        require=require,
        source="source",
        folders=lambda arm: ["0", "1", "2"],
        scale=SimpleNamespace(task_items=200),
    )


@pytest.mark.parametrize(("chance", "outcome"), [(0.9, "holds"), (0.5, "fails"), (0.76, "open")])
def test_a_share_of_the_score_is_judged_on_paired_items(
    chance: float, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"source": section({"a": 0.8, "b": 0.8}, 9)}
    made |= {str(seed): section({"a": chance, "b": chance}, seed) for seed in range(3)}
    monkeypatch.setattr(
        tasks, "score", lambda models, **_: [Scorecard.model_construct(tasks=made[models[0]], not_run=())]
    )
    found = TaskShare(ARM, 0.95).find(bench(task_data=Path("items")))[0]
    assert found.outcome == outcome
    assert found.readings[0].value == pytest.approx(made["source"].average)
    wanted = np.mean([made[str(seed)].average for seed in range(3)]) - 0.95 * made["source"].average
    assert found.effect == pytest.approx(wanted)


def test_tasks_of_other_sizes_count_the_same() -> None:
    one, other = section({"a": 0.9}, 0, 10).tasks[0], section({"b": 0.3}, 0, 90).tasks[0]
    both = TaskSection(tasks=(one, other), average=0.0, average_error=None, harness="made", seconds=0.0)
    assert task_samples([both]).value == pytest.approx((one.value + other.value) / 2)


def test_a_score_needs_items_and_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClaimNotRun, match="give --task-data FOLDER"):
        TaskShare(ARM, 0.95).find(bench())
    missing = Scorecard.model_construct(not_run=(NotRun(section="tasks", why="lm-eval is required"),))
    monkeypatch.setattr(tasks, "score", lambda models, **_: [missing])
    with pytest.raises(ClaimNotRun, match="tasks: lm-eval is required"):
        TaskShare(ARM, 0.95).find(bench(task_data=Path("items")))


@pytest.mark.parametrize(
    ("ratios", "outcome"), [((5, 5.2, 5.1), "holds"), ((1.1, 1, 1.2), "fails"), ((2, 8, 5), "open")]
)
def test_speed_is_judged_over_the_models_of_all_seeds(
    ratios: tuple[float, ...], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def card(speed: float) -> Scorecard:
        own = SpeedSection.model_construct(
            tokens_per_second=100.0 * speed, against=SpeedSection.model_construct(tokens_per_second=100.0)
        )
        return Scorecard.model_construct(speed=own, not_run=())

    monkeypatch.setattr(tasks, "score", lambda models, **_: [card(float(ratios[int(models[0])]))])
    found = SpeedRatio(ARM, 4.0).find(bench())[0]
    assert found.outcome == outcome
    assert found.note == f"{4 * 2**found.effect:.2f} times the source's speed"


def write(path: Path, spread: list[float]) -> Path:
    rows = [{"way": "full depth"}, {"way": "exits live", "over full depth": sum(spread) / 2, "spread": spread}]
    slow = [{"way": "exits live", "over full depth": 9.0, "spread": [8.0, 9.5]}]
    path.write_text(json.dumps({"model": {"1": slow, "16": rows}, "machine": "made"}))
    return path


@pytest.mark.parametrize(("spread", "outcome"), [([2.0, 2.4], "holds"), ([0.9, 1.1], "fails"), ([1.7, 2.1], "open")])
def test_recorded_throughput_is_that_of_the_largest_batch(spread: list[float], outcome: str, tmp_path: Path) -> None:
    found = RecordedThroughput(1.88).find(bench(engine=write(tmp_path / "engine.json", spread)))
    assert [each.outcome for each in found] == [outcome]
    assert found[0].comparison == "model with live exits 1.88 times as fast as full depth, 16 at once"


def test_throughput_needs_results_of_the_engine(tmp_path: Path) -> None:
    with pytest.raises(ClaimNotRun, match=r"give --engine docs/results/engine-exits\.json"):
        RecordedThroughput(1.88).find(bench())
    for text in ("{}", "[]", "not json", '{"model": {"1": []}}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ClaimNotRun, match=r"results of benchmarks/engine_exits\.py are required"):
            RecordedThroughput(1.88).find(bench(engine=tmp_path / "other.json"))


def test_the_committed_results_of_the_engine_can_be_read() -> None:
    results = Path(__file__).parents[2] / "docs" / "results" / "engine-exits.json"
    found = RecordedThroughput(1.88).find(bench(engine=results))
    assert found
    assert {each.outcome for each in found} <= {"holds", "fails", "open"}
