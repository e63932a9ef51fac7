"""Bytes of quantised weights."""

import pytest
import torch

from refold.blueprint.integers import FIT_SCHEMES, SCHEMES, Scheme, find_scheme
from refold.blueprint.quantisation import quantised_bytes
from refold.errors import RefoldError
from refold.nn.rounding import read_stored, round_weight
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
    rule = r"quantise: must be int8, or int2 to int6 with z for zero points and g64 or g128 .* such as int3g128"
    for wrong, meant in (("int7", "int8"), ("int3g65", "int3g64"), ("int2zg46", "int2zg64"), ("in4", "int4")):
        with pytest.raises(RefoldError, match=rf"{rule} \(got '{wrong}'\); did you mean '{meant}'\?"):
            find_scheme(wrong)


def test_a_name_says_bits_groups_and_zero_points() -> None:
    for name, scheme in SCHEMES.items():
        written = f"int{scheme.bits}{'z' * scheme.has_zero_point}"
        assert name == written + ("" if scheme.group in (None, 32) else f"g{scheme.group}")
    assert find_scheme("int2zg64") == Scheme(bits=2, group=64, has_zero_point=True)
    sizes = [scheme.bits for scheme in SCHEMES.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert set(FIT_SCHEMES) <= set(SCHEMES)
    assert [each.bits for each in map(find_scheme, FIT_SCHEMES)] == sorted(
        (find_scheme(name).bits for name in FIT_SCHEMES), reverse=True
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_are_those_of_the_tensors(name: str) -> None:
    scheme, weight = SCHEMES[name], torch.randn(33, 200, generator=torch.Generator().manual_seed(0))
    rounded = round_weight(weight, scheme)
    pieces = rounded.store(scheme)
    assert sum(each.nbytes for each in pieces.values()) == scheme.num_bytes(33, 200)
    # The integers of a row are next to each other, without gaps.
    words = -(-200 * scheme.bits // 32)
    assert tuple(pieces["_packed"].shape) == (33, words)
    assert read_stored(pieces, scheme, (33, 200)).dequantise().equal(rounded.dequantise())
