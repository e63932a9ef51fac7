"""Feature maps fitted to a softmax: the error falls, with the fit and with the rank."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from refold.calibration.layers import AttentionSample
from refold.conversion.map_fitter import FitSettings, MapFit
from refold.families.arch import ArchSpec
from refold.families.registry import read_arch
from refold.mixers.linear_attention import LinearAttention
from refold.nn.fills import make_fill
from refold.planning.approximation import LEARNED

QUICK = FitSettings(steps=80)


@pytest.fixture
def arch(make_source: Callable[..., Path]) -> ArchSpec:
    return read_arch(json.loads((make_source("llama") / "config.json").read_text()))


def make_sample(arch: ArchSpec, rows: int = 4, tokens: int = 48, seed: int = 0, spread: float = 1.0) -> AttentionSample:
    """Attention with the same queries and keys at every place but for noise, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    shape = rows, tokens, arch.num_attention_heads, arch.head_dim
    turn = torch.linalg.qr(torch.randn(arch.head_dim, arch.head_dim, generator=torch.Generator().manual_seed(99)))[0]
    key = spread * torch.randn(shape, generator=generator)
    query = spread * torch.randn(shape, generator=generator) @ turn
    resets = torch.zeros(rows, tokens, dtype=torch.bool)
    resets[:, tokens // 2] = True
    number, place = resets.long().cumsum(1), torch.arange(tokens)
    seen = (number[:, :, None] == number[:, None, :]) & (place[None, :] <= place[:, None])
    scores = torch.einsum("bthk,bshk->bhts", query, key).masked_fill(~seen[:, None], -torch.inf)
    return AttentionSample(query, key, scores.softmax(-1), resets)


def make_fit(arch: ArchSpec, **options: object) -> tuple[MapFit, dict[str, torch.Tensor]]:
    """A map and where it starts, queries and keys alike."""
    resolved = LinearAttention(**options).resolve(arch, "mixers[0]")  # pyright: ignore[reportArgumentType]
    shapes, fills = resolved.vectors(arch), resolved.fills(arch)
    start = {name: make_fill(fill, shapes[name], torch.Generator().manual_seed(1)) for name, fill in fills.items()}
    return MapFit(arch, resolved), start


@pytest.mark.parametrize("options", [{"feature_map": "hedgehog"}, {"feature_map": "t2r"}, {"window": 4}], ids=str)
def test_a_fitted_map_is_nearer_on_what_it_never_saw(arch: ArchSpec, options: dict) -> None:
    mapping, start = make_fit(arch, **options)
    fitted = mapping.fit(start, [make_sample(arch, seed=1), make_sample(arch, seed=2)], QUICK, seed=0)
    held_out = make_sample(arch, seed=3)
    before, after = mapping.measure(start, held_out), mapping.measure(fitted, held_out)
    assert after.distance < before.distance
    assert after.gap < 0.9 * before.gap
    assert {name for name in start if not torch.equal(start[name], fitted[name])} == set(LEARNED)


def test_the_start_is_left_as_it_was_and_two_fits_are_the_same_bits(arch: ArchSpec) -> None:
    mapping, start = make_fit(arch)
    before = {name: value.clone() for name, value in start.items()}
    one, other, third = (mapping.fit(start, [make_sample(arch)], QUICK, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(start[name], before[name]) for name in before)
    assert all(torch.equal(one[name], other[name]) for name in LEARNED)
    assert not torch.equal(one["q_map.weight"], third["q_map.weight"])


def test_heads_are_fitted_apart(arch: ArchSpec) -> None:
    mapping, start = make_fit(arch)
    sample = make_sample(arch)
    other = sample._replace(weights=sample.weights.clone())
    other.weights[:, 0] = torch.eye(sample.weights.shape[-1])
    one, two = (mapping.fit(start, [each], QUICK, seed=0)["q_map.weight"] for each in (sample, other))
    assert torch.equal(one[1:], two[1:])
    assert not torch.equal(one[0], two[0])


def test_random_features_come_nearer_with_their_number(arch: ArchSpec) -> None:
    sample = make_sample(arch, spread=0.6)
    errors = []
    for features in (8, 32, 128, 1024):
        mapping, start = make_fit(arch, feature_map="favor", features=features)
        errors.append(mapping.measure(start, sample))
    assert all(later.distance < earlier.distance for earlier, later in itertools.pairwise(errors))
    assert all(later.gap < earlier.gap for earlier, later in itertools.pairwise(errors))
    assert errors[-1].distance < errors[0].distance / 2


def test_random_features_need_the_same_directions_for_queries_and_keys(arch: ArchSpec) -> None:
    sample = make_sample(arch, spread=0.6)
    mapping, start = make_fit(arch, feature_map="favor", features=1024)
    crossed = {**start, "k_map.weight": start["k_map.weight"].flip(-1)}
    assert mapping.measure(crossed, sample).distance > 2 * mapping.measure(start, sample).distance


def test_a_window_over_everything_is_exact(arch: ArchSpec) -> None:
    mapping, start = make_fit(arch, window=48)
    error = mapping.measure(start, make_sample(arch))
    assert error.distance < 1e-5
    assert abs(error.gap) < 1e-3


def test_distance_and_gap_are_those_of_the_definition(arch: ArchSpec) -> None:
    mapping, start = make_fit(arch, feature_map="elu")
    sample = make_sample(arch, rows=2)
    rows = torch.einsum("bthk,bshk->bhts", *(torch.nn.functional.elu(x) + 1 for x in (sample.query, sample.key)))
    rows = rows * (sample.weights > 0)
    rows = rows / rows.sum(-1, keepdim=True)
    truth = sample.weights
    distance = 0.5 * (truth - rows).abs().sum(-1).mean()
    gap = torch.where(truth > 0, truth * (truth.clamp(min=1e-30) / rows.clamp(min=1e-30)).log(), 0.0).sum(-1).mean()
    error = mapping.measure(start, sample)
    assert error.distance == pytest.approx(float(distance), abs=1e-5)
    assert error.gap == pytest.approx(float(gap), abs=1e-3)


def test_weights_that_vanish_are_no_approximation(arch: ArchSpec) -> None:
    mapping, start = make_fit(arch, feature_map="t2r")
    nothing = {name: torch.zeros_like(value) for name, value in start.items()}
    assert mapping.measure(nothing, make_sample(arch)).distance == pytest.approx(1.0)


def test_a_mixer_that_does_not_normalise_is_measured_by_its_rows_shares(arch: ArchSpec) -> None:
    sample = make_sample(arch)
    shares = [make_fit(arch, feature_map="elu", normalise=normalise) for normalise in (True, False)]
    one, other = (mapping.measure(start, sample).distance for mapping, start in shares)
    assert one == pytest.approx(other, abs=1e-6)
