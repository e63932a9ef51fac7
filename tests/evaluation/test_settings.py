from collections.abc import Mapping

import pytest

from refold.errors import DataError
from refold.evaluation.settings import EvaluationSettings


@pytest.mark.parametrize(
    ("settings", "positions", "expected"),
    [
        (EvaluationSettings(), {"one": None}, (1024, 512, 4)),
        (EvaluationSettings(), {"one": 256, "other": 64}, (64, 32, 64)),
        (EvaluationSettings(context=1), {"one": 64}, (1, 1, 4096)),
        (EvaluationSettings(context=8192), {"one": None}, (8192, 4096, 1)),
        (EvaluationSettings(context=10, stride=3, batch_size=2), {"one": 10}, (10, 3, 2)),
    ],
)
def test_window_sizes(settings: EvaluationSettings, positions: Mapping[str, int | None], expected: tuple[int, ...]):
    assert settings.window_sizes(positions) == expected


def test_a_context_beyond_a_models_positions_names_the_model() -> None:
    with pytest.raises(DataError, match=r"context: must be at most 64, the positions of other \(got 65\)"):
        EvaluationSettings(context=65).window_sizes({"one": None, "other": 64})
