"""Linears and embeddings that store integers."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from refold.blueprint.integers import SCHEMES, Scheme
from refold.nn import quantised
from refold.nn.products import Int4Product, Int8Product
from refold.nn.quantised import QuantisedEmbedding, QuantisedLinear
from refold.nn.rounding import Rounded, read_stored, round_weight

NAMES = ("int8", "int6g128", "int5zg64", "int4", "int4z", "int3", "int2g64", "int2z")
KERNELS = ("int8", "int4", "int4z", "int4g64")
"""Schemes that a CPU multiplies without floats."""
INT3 = Scheme(bits=3, group=16, has_zero_point=True)


def make_linear(scheme: Scheme, rows: int = 48, columns: int = 64, dtype: torch.dtype = torch.float32) -> Any:
    linear = nn.Linear(columns, rows, dtype=dtype)
    nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(0))
    made = QuantisedLinear(linear, scheme).to(dtype)
    made.set(round_weight(linear.weight.data, scheme))
    return made


@pytest.fixture
def prefers_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run up to 64 rows, whatever this machine measures."""
    monkeypatch.setattr(quantised, "most_rows", lambda *arguments: 64)


@pytest.mark.parametrize("scheme", [*(SCHEMES[name] for name in NAMES), INT3], ids=str)
@pytest.mark.parametrize("columns", [64, 70, 7])
def test_pieces_hold_the_integers(scheme: Scheme, columns: int) -> None:
    weight = torch.randn(9, columns, generator=torch.Generator().manual_seed(0))
    rounded = round_weight(weight, scheme)
    pieces = rounded.store(scheme)
    wanted = {each.suffix: (each.shape, each.dtype) for each in scheme.pieces(9, columns)}
    assert {name: (tuple(each.shape), str(each.dtype)[6:]) for name, each in pieces.items()} == wanted
    assert sum(each.nbytes for each in pieces.values()) == scheme.num_bytes(9, columns)
    back = read_stored(pieces, scheme, (9, columns))
    assert back.dequantise().equal(rounded.dequantise())
    assert float((back.dequantise() - weight).abs().max()) < (2 if scheme.bits == 2 else 1)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_dequantised_weight(name: str) -> None:
    linear = make_linear(SCHEMES[name])
    x = torch.randn(3, 64, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    linear(x).square().sum().backward()
    nn.functional.linear(again, linear.weight, linear.bias).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, again.grad)
    assert not any(each.requires_grad for name, each in linear.named_parameters() if name != "bias")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("rows", [48, 70])
def test_a_kernel_replaces_the_integers_and_gives_them_back(name: str, rows: int, prefers_kernels: None) -> None:
    linear = make_linear(SCHEMES[name], rows, dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = linear(x)
        linear.prepare()
        assert linear.product is not None
        assert [name for name, _ in linear.named_parameters()] == ["bias"]
        torch.testing.assert_close(linear(x), expected, atol=0.1, rtol=0.02)
        many = torch.randn(65, 64, dtype=torch.bfloat16)
        assert linear(many).equal(nn.functional.linear(many, linear.weight) + linear.bias)
    for held in (linear, copy.deepcopy(linear), linear.float()):
        found = held.state_dict()
        assert found.keys() == before.keys()
        assert all(found[name].equal(value) for name, value in before.items() if name != "bias")
    assert linear.product is None


def test_scales_stay_bfloat16() -> None:
    linear = make_linear(SCHEMES["int8"])
    scale = linear.weight_scale.clone()
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        linear.to(dtype)
        assert linear.dtype == dtype
        assert linear.weight_scale.dtype == torch.bfloat16
        assert linear.weight_scale.equal(scale)


@pytest.mark.parametrize("scheme", [*(SCHEMES[name] for name in NAMES), INT3], ids=str)
def test_an_embedding_reads_single_rows(scheme: Scheme) -> None:
    table = nn.Embedding(37, 24)
    made = QuantisedEmbedding(table, scheme)
    rounded = round_weight(table.weight.data, scheme)
    made.set(rounded)
    ids = torch.tensor([[0, 36, 5], [7, 7, 1]])
    assert made(ids).equal(rounded.dequantise()[ids])


def test_an_embedding_shares_the_rows_of_a_heads_kernel(prefers_kernels: None) -> None:
    embedding, head = nn.Embedding(48, 64), make_linear(SCHEMES["int8"])
    made = QuantisedEmbedding(embedding, SCHEMES["int8"])
    made.set(head.rounded())
    ids = torch.tensor([3, 47, 3])
    before = made(ids)
    head.prepare()
    assert made.share(head.product)
    assert made(ids).equal(before)


def test_a_width_that_a_kernel_refuses_is_dequantised(prefers_kernels: None) -> None:
    linear = make_linear(SCHEMES["int4"], columns=70)
    linear.prepare()
    assert linear.product is None
    assert linear(torch.randn(2, 70)).shape == (2, 48)


def test_a_restored_weight_stays_on_the_device_of_its_product() -> None:
    linear = make_linear(SCHEMES["int8"])

    class Elsewhere(Int8Product):
        def unpack(self) -> Rounded:
            return round_weight(torch.zeros(48, 64, device="meta"), SCHEMES["int8"])

    linear.take(Elsewhere(linear.rounded(), None))
    linear.restore()
    own = {name: each.device.type for name, each in linear.named_parameters() if name != "bias"}
    assert own == dict.fromkeys(("weight_packed", "weight_scale", "weight_shape"), "meta")


@pytest.mark.parametrize("name", KERNELS)
def test_a_pickled_weight_is_held_as_it_is_stored(name: str, prefers_kernels: None) -> None:
    linear, x = make_linear(SCHEMES[name]), torch.randn(3, 64)
    weight = linear.weight
    linear.prepare()
    assert linear.product is not None
    back = pickle.loads(pickle.dumps(linear))
    assert back.product is None
    assert linear.product is not None
    assert torch.equal(back.weight, weight)
    back.prepare()
    assert torch.equal(back(x), linear(x))
    copied = copy.deepcopy(linear)
    assert copied.product is not None
    assert torch.equal(copied(x), linear(x))
    copied.restore()
    assert torch.equal(copied.weight, weight)


@pytest.mark.parametrize(("dtype", "unpacks"), [(torch.bfloat16, False), (torch.float32, True)])
def test_many_rows_do_not_unpack_a_weight_where_that_costs_more(monkeypatch, dtype: torch.dtype, unpacks: bool) -> None:
    monkeypatch.setattr(quantised, "most_rows", lambda *_: 1)
    linear, calls = make_linear(SCHEMES["int4"], dtype=dtype), []
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    unpack = Int4Product.unpack
    monkeypatch.setattr(Int4Product, "unpack", lambda self: calls.append(1) or unpack(self))
    with torch.no_grad():
        wanted = linear(x)
        linear.prepare()
        found = linear(x)
    assert bool(calls) == unpacks
    assert (found - wanted).abs().max() <= 2e-2 * wanted.abs().max()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in KERNELS])
def test_without_a_kernel_a_linear_multiplies_by_the_floats_of_its_integers(name: str) -> None:
    linear, x = make_linear(SCHEMES[name]), torch.randn(3, 64)
    expected = nn.functional.linear(x, linear.weight, linear.bias)
    linear.prepare()
    assert linear.product is None
    assert torch.equal(linear(x), expected)
    back = pickle.loads(pickle.dumps(linear))
    assert torch.equal(back(x), expected)
