"""float32 products by oneDNN: as exact as torch's own, only where they pay, and the switch is as before afterwards."""

import pytest
import torch

from refold.nn import processor as module
from refold.nn.processor import MOST_ERROR, fast_float32


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch):
    """Makes the processor look like another."""

    def make(vendor: str, *instructions: str, is_exact: bool = True) -> None:
        monkeypatch.setattr(module, "_vendor", lambda: vendor)
        monkeypatch.setattr(module, "has_instructions", lambda name: name in instructions)
        monkeypatch.setattr(module, "_is_exact", lambda: is_exact)
        module._pays.cache_clear()

    yield make
    module._pays.cache_clear()


def test_products_are_as_exact_as_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((1, 64, 64), (3, 7, 5), (65, 1025, 33), (256, 512, 128)):
        a = torch.randn(rows, inner, generator=generator)
        b = torch.randn(columns, inner, generator=generator)
        exact = a.double() @ b.double().T
        with fast_float32():
            assert (a @ b.T - exact).norm() <= MOST_ERROR * exact.norm()


@pytest.mark.parametrize(
    ("vendor", "instructions", "is_exact", "expected"),
    [
        ("AuthenticAMD", ("avx512",), True, "medium"),
        ("AuthenticAMD", ("avx512",), False, "highest"),
        ("AuthenticAMD", (), True, "highest"),
        ("AuthenticAMD", ("avx512", "amx_tile"), True, "highest"),
        ("GenuineIntel", ("avx512",), True, "highest"),
    ],
)
def test_the_switch_follows_the_processor(processor, vendor, instructions, is_exact, expected) -> None:
    processor(vendor, *instructions, is_exact=is_exact)
    with fast_float32():
        assert torch.get_float32_matmul_precision() == expected
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_switch_is_as_before_after_an_error_and_for_other_devices(processor) -> None:
    processor("AuthenticAMD", "avx512")
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyError), fast_float32():
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
        with fast_float32("cuda"):
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_products_that_are_rounded_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # Stands for oneDNN on a processor with matrix tiles.
    product = torch.Tensor.__matmul__

    def round_products(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if one.dtype == torch.float64:
            return product(one, other)
        return product(one.bfloat16(), other.bfloat16()).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", round_products)
    assert not module._is_exact()
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    assert torch.get_float32_matmul_precision() == "highest"
