import json
from dataclasses import asdict

import pytest

from refold.healing.thaw import ThawRule, ThawState
from refold.recipe.heal import Thaw


def _run(rule, losses, norms=None):
    """The state after each step."""
    state, states = ThawState(), []
    for index, loss in enumerate(losses):
        norm = None if norms is None else norms[index]
        state = rule.after(state, index + 1, loss, norm if rule.wants_norm(index + 1) else None)
        states.append(state)
    return states


def _rule(num_steps=100, **settings):
    return ThawRule(Thaw(**{"window": 0.1, "threshold": 0.05, "warmup": 0.05, **settings}), num_steps)


def test_it_thaws_after_the_first_window_that_improves_too_little():
    # Means 4.0, 3.0 (25% better), 2.9 (3.3% better).
    states = _run(_rule(), [4.0] * 10 + [3.0] * 10 + [2.9] * 10)
    assert [state.thawed_at for state in states] == [None] * 29 + [30]
    assert states[-1].reason == "the loss improved by less than 5.00% in a window of 10 steps"


def test_it_waits_while_windows_improve():
    states = _run(_rule(), [10 * 0.9 ** (step // 10) for step in range(100)])
    assert states[-1].thawed_at is None


def test_the_mean_of_a_window_counts_and_not_its_end():
    falling_inside = ([5.0] * 5 + [3.0] * 5) * 2  # both windows have the mean 4
    assert _run(_rule(), falling_inside)[-1].thawed_at == 20


def test_patience_counts_windows_in_a_row():
    losses = [4.0] * 10 + [3.99] * 10 + [3.0] * 10 + [2.99] * 10 + [2.98] * 10
    assert _run(_rule(patience=2), losses)[-1].thawed_at == 50
    assert _run(_rule(patience=1), losses)[-1].thawed_at == 20


def test_a_rising_loss_is_no_improvement():
    assert _run(_rule(), [3.0] * 10 + [4.0] * 10)[-1].thawed_at == 20


def test_steps_without_a_loss_are_left_out():
    losses = [4.0] * 10 + [float("nan")] * 5 + [2.0] * 5
    assert _run(_rule(), losses)[-1].last == 2.0
    all_bad = [4.0] * 10 + [float("nan")] * 10 + [3.99] * 10
    assert [state.thawed_at for state in _run(_rule(), all_bad)][-1] == 30


def test_the_norm_of_the_training_weights_decides_where_it_is_asked():
    norms = [1.0 + 0.1 * step for step in range(20)] + [3.0] * 10
    states = _run(_rule(when="norm"), [1.0] * 30, norms)
    assert states[-1].thawed_at == 30
    assert "norm grew by less than" in states[-1].reason
    assert _run(_rule(when="norm"), [1.0] * 20, norms)[-1].thawed_at is None


def test_a_share_of_the_steps_thaws_in_any_case():
    losses = [10 * 0.9**step for step in range(60)]
    for when in ("improvement", "share"):
        states = _run(_rule(when=when, latest=0.5), losses)
        assert next(state.thawed_at for state in states if state.thawed_at) == 50, when


def test_thawed_weights_have_their_own_warm_up():
    rule, state = _rule(), ThawState(thawed_at=20)
    assert rule.factor(ThawState(), 99) == 0.0
    assert [rule.factor(state, step) for step in (20, 21, 24, 25, 99)] == pytest.approx([0.2, 0.4, 1.0, 1.0, 1.0])


def test_windows_scale_with_the_run_as_in_the_paper():
    rule = ThawRule(Thaw(), 145_000)
    assert rule.window == pytest.approx(5_000, rel=0.02)
    assert Thaw().warmup * 145_000 == pytest.approx(2_000, rel=0.02)
    assert ThawRule(Thaw(), 3).window == 1


def test_a_state_survives_json_in_the_middle_of_a_window():
    losses = [4.0] * 10 + [3.0] * 10 + [2.9] * 10
    state = _run(_rule(), losses[:17])[-1]
    state = ThawState(**json.loads(json.dumps(asdict(state))))
    for step in range(17, 30):
        state = _rule().after(state, step + 1, losses[step])
    assert state == _run(_rule(), losses)[-1]
