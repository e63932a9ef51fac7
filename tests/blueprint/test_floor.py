"""The floor of a model's bytes."""

from collections.abc import Callable
from typing import Any

import pytest

from refold.blueprint.cost import cost, count_parameters
from refold.blueprint.floor import find_floor
from refold.blueprint.integers import find_scheme
from refold.blueprint.quantisation import quantised_bytes
from refold.planning.build import identity_blueprint


@pytest.mark.parametrize("tied", [True, False])
def test_the_floor_is_what_remains_beside_the_linears(make_arch: Callable[..., Any], tied: bool) -> None:
    blueprint = identity_blueprint(make_arch(3, "qwen2", tie_word_embeddings=tied))
    floor, counted = find_floor(blueprint), count_parameters(blueprint)
    assert floor.outer_parameters == counted.embedding + counted.head == (1 if tied else 2) * 96 * 32
    assert floor.parameters == counted.total == cost(blueprint, 2).parameters
    # Rounding to few bits leaves embedding, head, norms and biases as they are.
    linears = counted.total - floor.outer_parameters - floor.kept_bytes // 2
    scheme = find_scheme("int8")
    rounded = quantised_bytes(blueprint, 2, scheme) - 2 * floor.outer_parameters - floor.kept_bytes
    assert linears < rounded < 1.5 * linears
    assert floor.outer_bytes["int4"] < floor.outer_bytes["int8"] < 2 * floor.outer_parameters
    assert floor.outer_bytes["int8"] == (1 if tied else 2) * scheme.num_bytes(96, 32)
