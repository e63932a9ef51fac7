import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refold.calibration.svd import Truncated, truncated_svd

SPECTRA = {
    "flat": lambda size: torch.ones(size),
    "slow": lambda size: torch.arange(1, size + 1).float() ** -0.3,
    "real": lambda size: torch.arange(1, size + 1).float() ** -0.8,
    "steep": lambda size: 0.9 ** torch.arange(size).float(),
    "low rank": lambda size: torch.cat((torch.ones(6), torch.zeros(size - 6))),
}


def matrix_of(spectrum: torch.Tensor, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(spectrum), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, len(spectrum), generator=generator)).Q
    return (left * spectrum) @ right.T


def orthonormal(columns: torch.Tensor) -> bool:
    return torch.allclose(columns.T @ columns, torch.eye(columns.shape[1]), atol=1e-4)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 24, 5), (24, 40, 24), (640, 700, 32), (1100, 560, 8)])
def test_the_kept_energy_is_at_least_99_percent_of_lapacks(spectrum, rows, columns, rank):
    matrix = matrix_of(SPECTRA[spectrum](min(rows, columns)), rows, columns)
    best = torch.linalg.svdvals(matrix)[:rank].double().square().sum() / matrix.double().square().sum()
    found = truncated_svd(matrix, rank)
    assert found.kept >= 0.99 * float(best)
    assert found.kept <= float(best) + 1e-5
    lost = (matrix - found.matrix()).double().square().sum() / matrix.double().square().sum()
    assert float(1 - lost) == pytest.approx(found.kept, abs=1e-5)


def test_long_sides_and_low_ranks_take_the_krylov_space():
    matrix = matrix_of(SPECTRA["real"](600), 600, 640)
    found = truncated_svd(matrix, 16)
    assert found.u.shape == (600, 16)
    assert orthonormal(found.u)
    # A Gram matrix in float64 would give LAPACK's values to the last digit.
    assert not torch.equal(found.s, truncated_svd(matrix, 16, "exact").s)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_triples_are_orthonormal_and_sorted(rows, columns, seed, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    for mode in ("auto", "exact"):
        found = truncated_svd(matrix, rank, mode)
        assert (found.u.shape, found.s.shape, found.v.shape) == ((rows, rank), (rank,), (columns, rank))
        assert orthonormal(found.u)
        assert (found.s.diff() <= 1e-4 * found.s[0]).all()
        assert torch.allclose(found.s, torch.linalg.svdvals(matrix)[:rank], atol=1e-3)
        a, b = found.factors()
        assert torch.allclose(b @ a, found.matrix(), atol=1e-5)
    if rank == min(rows, columns):
        assert torch.allclose(found.matrix(), matrix, atol=1e-4)
        assert truncated_svd(matrix, rank).kept == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(40, 24), (600, 640)])
def test_the_same_seed_gives_the_same_bits(rows, columns):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    one, other = (truncated_svd(matrix, 8, seed=5) for _ in range(2))
    assert torch.equal(one.u, other.u)
    assert torch.equal(one.s, other.s)
    assert torch.equal(one.v, other.v)


def test_a_zero_matrix_keeps_all_it_has():
    found = truncated_svd(torch.zeros(6, 5), 2)
    assert found.kept == 1
    assert not found.matrix().any()
    assert torch.isfinite(found.v).all()


def test_some_of_the_triples_decompose_the_same_matrix():
    found = truncated_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 3)
    assert found.take(torch.tensor([1])).kept == pytest.approx(4 / 14)
    assert isinstance(found.take(slice(2)), Truncated)
    assert found.take(slice(2)).kept == pytest.approx(13 / 14)
