"""Bytes of quantised weights."""

import pytest

from refold.blueprint.integers import SCHEMES, find_scheme
from refold.blueprint.quantisation import quantised_bytes
from refold.errors import RefoldError
from refold.planning.build import identity_blueprint
from refold.sources.source_model import read_source_model


@pytest.mark.parametrize(
    ("name", "rows", "columns", "expected"),
    [
        ("int8", 3, 100, 3 * (100 + 2) + 16),
        ("int4", 1, 64, 32 + 2 * 2 + 16),
        ("int4", 5, 33, 5 * (20 + 2 * 2) + 16),  # a group of one is left over, and a word of one integer
        ("int4z", 2, 96, 2 * (48 + 3 * 2) + 3 * 4 + 16),  # zero points of two rows in a word for each group
    ],
)
def test_integers_scales_zero_points_and_shape_are_counted(name: str, rows: int, columns: int, expected: int) -> None:
    assert find_scheme(name).num_bytes(rows, columns) == expected


def test_wide_weights_cost_eight_and_four_and_a_half_bits() -> None:
    bits = {name: 8 * scheme.num_bytes(2**8, 2**12) / 2**20 for name, scheme in SCHEMES.items()}
    assert bits["int8"] == pytest.approx(8, rel=1e-2)
    assert bits["int4"] == pytest.approx(4.5, rel=1e-3)
    assert bits["int4z"] == pytest.approx(4.625, rel=1e-3)


def test_what_is_no_linear_keeps_its_bytes(make_source) -> None:
    blueprint = identity_blueprint(read_source_model(make_source("llama")).arch)
    small, large = (quantised_bytes(blueprint, size, SCHEMES["int8"]) for size in (2, 4))
    arch = blueprint.arch
    kept = (2 - arch.tied_head) * arch.vocab_size * arch.hidden_size + (2 * arch.num_layers + 1) * arch.hidden_size
    assert large - small == 2 * kept


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(RefoldError, match=r"quantise: must be one of int8, int4, int4z \(got 'int5'\)"):
        find_scheme("int5")
