"""Initial values of fresh vectors of mixers."""

import math

import pytest
import torch

from refold.mixers.spec import Fill
from refold.nn.fills import make_fill


def made(kind, shape, low=0.0, high=0.0, seed=0):
    return make_fill(Fill(kind, low, high), shape, torch.Generator().manual_seed(seed))


def test_steps_lie_between_their_bounds_after_softplus():
    steps = torch.nn.functional.softplus(made("softplus_inverse", (4000,), 0.001, 0.1))
    assert float(steps.min()) >= 0.001
    assert float(steps.max()) <= 0.1001
    # Uniform in the logarithm: the median is the geometric mean of the bounds.
    assert float(steps.median()) == pytest.approx(0.01, rel=0.1)


def test_decays_are_logs_of_what_lies_between_their_bounds():
    drawn = made("log_uniform", (2000,), 1.0, 16.0).exp()
    assert float(drawn.min()) >= 1
    assert float(drawn.max()) <= 16.001
    assert float(drawn.mean()) == pytest.approx(8.5, rel=0.05)
    assert torch.allclose(made("log_range", (2, 3)).exp(), torch.tensor([[1.0, 2.0, 3.0]] * 2))


def test_a_convolution_passes_on_the_current_token():
    assert torch.equal(made("last_tap", (2, 3)), torch.tensor([[0.0, 0.0, 1.0]] * 2))


def test_further_directions_than_a_head_has_numbers_are_other_ones():
    found = made("identity", (2, 8, 20), 1.0)
    assert torch.equal(found[0, :, :8], torch.eye(8))
    overlap = (found.mT @ found).abs() - torch.eye(20)
    assert float(overlap.max()) < 0.999
    assert torch.allclose(found.norm(dim=1), torch.ones(2, 20), atol=1e-5)


@pytest.mark.parametrize("kind", ["orthogonal", "cosine"])
def test_random_directions_are_orthogonal_in_blocks_and_as_long_as_gaussian_ones(kind):
    found = made(kind, (4, 32, 64))
    products = found[..., :32].mT @ found[..., :32]
    off = products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))
    if kind == "orthogonal":
        assert float(off.abs().max()) < 1e-3
    assert float(found.norm(dim=1).mean()) == pytest.approx(math.sqrt(32), rel=0.05)


def test_orthogonal_directions_are_drawn_uniformly():
    """The signs of plain `torch.linalg.qr` are not random, which biases the mean of features away from exp(q . k)."""
    heads, size = 40_000, 8
    found = made("orthogonal", (heads, size, size)).double()
    means = found.mean(dim=0)
    # A mean of 40,000 numbers of variance 1 is off by 0.005.
    assert float(means.abs().max()) < 0.025
    plain = torch.linalg.qr(torch.randn(heads, size, size, generator=torch.Generator().manual_seed(1)))[0].double()
    assert float((plain * size**0.5).mean(dim=0).abs().max()) > 0.3

    generator = torch.Generator().manual_seed(2)
    query, key = (0.3 * torch.randn(200, size, generator=generator, dtype=torch.float64) for _ in range(2))
    kernel = (query * key).sum(-1).exp()

    def error(directions):
        both = torch.einsum("nk,hkd->hnd", query + key, directions).exp().mean(dim=(0, 2))
        squares = (query.square() + key.square()).sum(-1)
        return float(((both * (-squares / 2).exp() - kernel) / kernel).abs().mean())

    assert error(found) < 0.005
    assert error(plain * torch.randn(heads, size, size, generator=generator).norm(dim=-1)[:, None]) > 0.05


def test_further_identity_directions_are_drawn_uniformly():
    found = made("identity", (20_000, 4, 8), 1.0)[..., 4:].mean(dim=0)
    assert float(found.abs().max()) < 0.02


def test_constants_and_normals():
    assert torch.equal(made("constant", (3,), 2.5), torch.full((3,), 2.5))
    assert float(made("normal", (5000,), 0.3).std()) == pytest.approx(0.3, rel=0.05)
    assert torch.equal(made("normal", (5,), 1.0, seed=1), made("normal", (5,), 1.0, seed=1))
