"""The weighted norm against brute force in float64."""

import pytest
import torch
from torch import Tensor

from refold.calibration.weighting import Weighting, parallel_sum, ridged

ROWS, COLUMNS = 9, 12


def moment(size: int, seed: int) -> Tensor:
    """A second moment with directions of very different variance."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
    scaled = drawn * torch.logspace(0, -1.5, size, dtype=torch.float64)
    turned = scaled @ torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return turned.T @ turned / len(turned)


def matrix(rows: int = ROWS, columns: int = COLUMNS, seed: int = 5) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def weighted_error(error: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> float:
    """trace(G E C E^T), which is |T E S|^2 whatever the roots T and S are."""
    wide = error.double()
    inputs = torch.eye(wide.shape[1], dtype=torch.float64) if inputs is None else inputs
    outputs = torch.eye(wide.shape[0], dtype=torch.float64) if outputs is None else outputs
    return float(torch.trace(outputs @ wide @ inputs @ wide.T))


KINDS = {
    "inputs": (moment(COLUMNS, 1), None),
    "outputs": (None, moment(ROWS, 2)),
    "both": (moment(COLUMNS, 1), moment(ROWS, 2)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_what_is_truncated_is_the_nearest_of_its_rank(kind, rank):
    inputs, outputs = KINDS[kind]
    given = matrix()
    found = Weighting(inputs, outputs).truncate(given, rank, "exact", 0)
    lost = weighted_error(given - found.matrix(), inputs, outputs)
    plain = Weighting().truncate(given, rank, "exact", 0)
    assert lost < 0.97 * weighted_error(given - plain.matrix(), inputs, outputs)
    a, b = found.factors()
    assert a.shape == (rank, COLUMNS)
    assert torch.allclose(b @ a, found.matrix(), atol=1e-5)
    generator = torch.Generator().manual_seed(3)
    for size in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(25):
            other_a = a + size * torch.randn(a.shape, generator=generator)
            other_b = b + size * torch.randn(b.shape, generator=generator)
            assert weighted_error(given - other_b @ other_a, inputs, outputs) >= lost * (1 - 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_truncated_is_the_decomposition_between_the_roots(kind):
    inputs, outputs = KINDS[kind]
    given, rank = matrix(), 4

    def root(moment: Tensor | None, size: int) -> Tensor:
        # The symmetric root, which is another than the Cholesky factor: what is nearest does not depend on it.
        if moment is None:
            return torch.eye(size, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(moment)
        return (vectors * values.sqrt()) @ vectors.T

    right, left = root(inputs, COLUMNS), root(outputs, ROWS)
    u, s, vh = torch.linalg.svd(left @ given.double() @ right)
    expected = torch.linalg.inv(left) @ (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(right)
    weighting = Weighting(inputs, outputs)
    found = weighting.truncate(given, rank, "exact", 0)
    assert torch.allclose(found.matrix().double(), expected, atol=1e-4)
    assert torch.allclose(weighting.spectrum(given), s.square(), rtol=1e-4, atol=1e-6)
    assert found.kept == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), rel=1e-5)
    lost = weighting.energy(given - found.matrix())
    assert lost == pytest.approx(float(s[rank:].square().sum()), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_energy_is_the_sum_of_the_spectrum_and_the_trace(kind):
    inputs, outputs = KINDS[kind]
    weighting, given = Weighting(inputs, outputs), matrix()
    assert weighting.energy(given) == pytest.approx(weighted_error(given, inputs, outputs), rel=1e-5)
    assert float(weighting.spectrum(given).sum()) == pytest.approx(weighting.energy(given), rel=1e-5)
    assert torch.linalg.vector_norm(weighting.apply(given)).square().item() == pytest.approx(
        weighting.energy(given), rel=1e-5
    )


@pytest.mark.parametrize("shape", [(9, 12), (12, 9)])
def test_moments_of_one_weigh_nothing(shape):
    rows, columns = shape
    given = matrix(rows, columns)
    plain = Weighting().truncate(given, 3, "exact", 0)
    ones = Weighting(torch.eye(columns), torch.eye(rows))
    assert not ones.is_plain
    found = ones.truncate(given, 3, "exact", 0)
    assert torch.allclose(found.matrix(), plain.matrix(), atol=1e-5)
    assert found.kept == pytest.approx(plain.kept, rel=1e-6)
    assert torch.allclose(ones.spectrum(given), Weighting().spectrum(given), rtol=1e-5)


def test_all_of_a_matrix_is_the_matrix():
    given = matrix()
    found = Weighting(*KINDS["both"]).truncate(given, ROWS, "auto", 0)
    assert torch.allclose(found.matrix(), given, atol=1e-4)
    assert found.kept == pytest.approx(1, abs=1e-5)


def test_a_ridge_frees_no_direction_and_nothing_seen_weighs_all_alike():
    flat = torch.zeros(4, 4, dtype=torch.float64)
    assert torch.equal(ridged(flat, 0.1), torch.eye(4, dtype=torch.float64))
    flat[0, 0] = 8
    assert torch.allclose(ridged(flat, 0.1).diagonal(), torch.tensor([8.2, 0.2, 0.2, 0.2], dtype=torch.float64))


def test_the_parallel_sum_is_what_two_inverses_add_up_to():
    one, other = moment(6, 1) + torch.eye(6), moment(6, 2) + torch.eye(6)
    like = torch.zeros(3, 6)
    expected = torch.linalg.inv(torch.linalg.inv(one) + torch.linalg.inv(other))
    assert torch.allclose(parallel_sum(one, other, like), expected, rtol=1e-8)
    assert torch.allclose(parallel_sum(None, None, like), torch.eye(6, dtype=torch.float64) / 2)
    eye = torch.eye(6, dtype=torch.float64)
    assert torch.allclose(parallel_sum(one, None, like), parallel_sum(one, eye, like))
