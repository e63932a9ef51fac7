"""Products of prepared weights are x W^T + b, with W as the format holds it."""

import pytest
import torch
from torch import Tensor, nn

from refold.blueprint.integers import SCHEMES
from refold.nn import workshop as preparation
from refold.nn.products import FORMATS, INTEGERS, NEVER, IntegerProduct, count_rows
from refold.nn.rounding import round_weight
from refold.nn.workshop import Workshop

TOLERANCE = {"float32": 1e-6, "bfloat16": 6e-3, "int8": 6e-3, "int4": 6e-3, "int4z": 6e-3}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def workshop(format: str, keep_dense: bool = False) -> Workshop:
    return Workshop(torch.float32 if format == "float32" else torch.bfloat16, torch.device("cpu"), keep_dense)


def held(weight: Tensor, format: str) -> Tensor:
    """The weight as numbers of a format."""
    return round_weight(weight, SCHEMES[format]).dequantise() if format in SCHEMES else weight


def far(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("rows", [1, 3, 64, 200])
@pytest.mark.parametrize("shape", [(64, 64), (80, 96), (24, 32), (256, 768), (1, 64)])
@pytest.mark.parametrize("format", FORMATS)
def test_a_product_is_that_of_the_numbers_it_holds(format, shape, rows):
    weight, bias, x = draw(*shape), draw(shape[0]), draw(rows, shape[1])
    maker = workshop(format)
    x = x.to(maker.dtype)
    product = maker.make("weight", weight, bias, format)
    assert not maker.refused
    expected = nn.functional.linear(x.float(), held(weight, format), bias)
    assert far(product(x), expected) < TOLERANCE[format]
    total = draw(rows, shape[0] + 5).to(maker.dtype)
    before = total.float().clone()
    product.add_to(total[:, 5:], x)
    assert far(total[:, 5:], before[:, 5:] + expected) < 2 * TOLERANCE[format]
    assert torch.equal(total[:, :5].float(), before[:, :5])


@pytest.mark.parametrize("format", FORMATS)
def test_an_input_may_be_columns_of_a_wider_tensor(format):
    weight, maker = draw(64, 64), workshop(format)
    product = maker.make("weight", weight, None, format)
    for rows, begin in ((7, 100), (1, 3), (1, 33), (2, 64)):
        x = draw(rows, 200).to(maker.dtype)[:, begin : begin + 64]
        assert far(product(x), nn.functional.linear(x.float(), held(weight, format))) < TOLERANCE[format]


@pytest.mark.parametrize("outputs", [slice(0, 64), slice(64, 128), slice(128, 208), slice(64, 208)])
@pytest.mark.parametrize("format", FORMATS)
def test_a_cut_product_gives_some_of_the_outputs(format, outputs):
    weight, bias, maker = draw(208, 64), draw(208), workshop(format)
    product = maker.make("weight", weight, bias, format)
    x = draw(5, 64).to(maker.dtype)
    cut = product.cut(outputs)
    assert cut is not None
    assert far(cut(x), product(x)[:, outputs].float()) < 1e-6
    assert far(cut(x), product(x)[:, : outputs.stop - outputs.start].float()) > 0.1 or not outputs.start


def test_integers_of_4_bits_are_not_cut_inside_a_block():
    assert workshop("int4").make("weight", draw(208, 64), None, "int4").cut(slice(32, 64)) is None


@pytest.mark.parametrize(("format", "columns"), [("int8", 40), ("int4", 48)])
def test_a_shape_that_a_kernel_refuses_is_held_in_floats_and_told(format, columns):
    maker, weight, x = workshop(format), draw(64, columns), draw(3, columns).bfloat16()
    product = maker.make("q_proj", weight, None, format)
    assert len(maker.refused) == 1
    assert "q_proj (64, " in maker.refused[0]
    assert f"not in {format}" in maker.refused[0]
    assert far(product(x), nn.functional.linear(x.float(), weight)) < 1e-2


def test_float_activations_run_through_integer_kernels():
    weight, x = draw(64, 64), draw(3, 64)
    product = Workshop(torch.float32, torch.device("cpu")).make("weight", weight, None, "int4")
    assert product(x).dtype == torch.float32
    assert far(product(x), nn.functional.linear(x, held(weight, "int4"))) < 1e-2


def test_many_rows_run_in_floats_of_the_same_numbers(monkeypatch):
    monkeypatch.setattr(preparation, "count_rows", lambda *_: 4)
    weight, bias = draw(64, 64), draw(64)
    maker = workshop("int4", keep_dense=True)
    product = maker.make("weight", weight, bias, "int4")
    few, many = draw(3, 64).bfloat16(), draw(4, 64).bfloat16()
    for x in (few, many):
        assert far(product(x), nn.functional.linear(x.float(), held(weight, "int4"), bias)) < 1e-2
    assert product.num_bytes == 64 * 64 * (5 / 8 + 2)
    # The kernel itself runs few rows alone.
    monkeypatch.setattr(IntegerProduct, "run", None)
    monkeypatch.setattr(INTEGERS["int4"], "run", None)
    product(many)
    with pytest.raises(TypeError):
        product(few)


@pytest.mark.parametrize("name", INTEGERS)
def test_rows_from_which_floats_are_faster_are_measured_once(name):
    count_rows.cache_clear()
    found = count_rows(INTEGERS[name], (64, 64), torch.bfloat16, torch.get_num_threads())
    assert found == NEVER or 1 <= found <= 64
    assert count_rows(INTEGERS[name], (64, 64), torch.bfloat16, torch.get_num_threads()) == found
    assert count_rows.cache_info().hits == 1


def test_a_weight_that_others_use_is_not_copied_unless_allowed():
    weight = nn.Parameter(draw(512, 256))
    shared = workshop("float32")
    product = shared.make("lm_head", weight, None, "float32", shares=True)
    assert shared.num_bytes == 0
    weight.data.zero_()
    assert not product(draw(2, 256)).any()
    copied = workshop("float32", keep_dense=True)
    copied.make("lm_head", weight, None, "float32", shares=True)
    assert copied.num_bytes == weight.nbytes


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_columns_of_a_wider_tensor_are_multiplied(name: str) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    product = INTEGERS[name](round_weight(weight, SCHEMES[name]), None)
    wide = torch.randn(5, 192, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert product(wide[:, 64:128]).equal(product(wide[:, 64:128].contiguous()))
