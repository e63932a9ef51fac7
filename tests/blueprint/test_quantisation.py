"""Bytes of quantised weights."""

import pytest

from refold.blueprint.quantisation import SCHEMES, find_scheme, quantised_bytes
from refold.errors import RefoldError
from refold.planning.build import identity_blueprint
from refold.sources.source_model import read_source_model


@pytest.mark.parametrize(
    ("name", "rows", "columns", "expected"),
    [
        ("int8", 3, 100, 3 * (100 + 2)),
        ("int4", 1, 64, 32 + 2 * 2 + 1),
        ("int4", 5, 33, 5 * (17 + 2 * 2 + 1)),  # a group of one is left over, and half a byte
        ("int4", 2, 96, 2 * (48 + 3 * 2 + 2)),
    ],
)
def test_integers_scales_and_zero_points_are_counted(name: str, rows: int, columns: int, expected: int) -> None:
    assert find_scheme(name).num_bytes(rows, columns) == expected


def test_wide_rows_cost_eight_and_four_and_five_eighths_bits() -> None:
    bits = {name: 8 * scheme.num_bytes(1, 2**16) / 2**16 for name, scheme in SCHEMES.items()}
    assert bits == {"int8": pytest.approx(8, rel=1e-3), "int4": 4.625}


def test_what_is_no_linear_keeps_its_bytes(make_source) -> None:
    blueprint = identity_blueprint(read_source_model(make_source("llama")).arch)
    small, large = (quantised_bytes(blueprint, size, SCHEMES["int8"]) for size in (2, 4))
    arch = blueprint.arch
    kept = (2 - arch.tied_head) * arch.vocab_size * arch.hidden_size + (2 * arch.num_layers + 1) * arch.hidden_size
    assert large - small == 2 * kept


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(RefoldError, match=r"quantise: must be one of int8, int4 \(got 'int5'\); did you mean 'int"):
        find_scheme("int5")
