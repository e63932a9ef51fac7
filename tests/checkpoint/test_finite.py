import pytest
import torch

from refold.checkpoint.finite import first_not_finite, require_finite
from refold.errors import SourceError


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 2, 3), (2, 0, 4)])
def test_one_entry_is_found_wherever_it_is(dtype, value, place):
    tensor = torch.linspace(-3, 3, 45).reshape(3, 3, 5)
    assert first_not_finite(tensor.to(dtype)) is None
    tensor[place] = value
    found = first_not_finite(tensor.to(dtype).contiguous())
    assert found is not None
    assert found[0] == place
    assert str(found[1]) == str(value)


def test_the_first_of_several_is_told_and_views_count_as_seen():
    tensor = torch.zeros(4, 6)
    tensor[3, 1] = tensor[1, 5] = torch.nan
    assert first_not_finite(tensor) is not None
    assert first_not_finite(tensor)[0] == (1, 5)  # pyright: ignore[reportOptionalSubscript]
    assert first_not_finite(tensor.T)[0] == (1, 3)  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0),
        torch.tensor([1, 2]),
        torch.tensor([True]),
        torch.tensor(65504.0).half(),
        torch.tensor([3e38, 3e38]),
        torch.full((100,), 65504.0).half(),
        torch.empty(3, device="meta"),
    ],
)
def test_finite_ones_pass_however_large_their_sum(tensor):
    assert first_not_finite(tensor) is None


def test_a_complex_number_counts_by_its_parts():
    assert first_not_finite(torch.tensor([1 + 1j])) is None
    assert first_not_finite(torch.tensor([1 + 1j, complex(0, float("nan"))])) is not None


def test_an_overflow_is_told_from_a_number_that_was_never_one():
    with pytest.raises(SourceError, match=r"m: w: finite .* \(got inf at \[1\]\); values above 65,504 overflow"):
        require_finite(torch.tensor([1.0, 70_000.0]).half(), "w", "m", SourceError, "mend it")
    with pytest.raises(SourceError, match=r"m: w: finite numbers are required \(got nan at \[0\]\); mend it"):
        require_finite(torch.tensor([torch.nan]).half(), "w", "m", SourceError, "mend it")
