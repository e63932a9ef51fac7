"""Distances of weights and streams are those of plain formulas."""

import numpy as np
import pytest
import torch

from refold.calibration import similarity
from refold.calibration.similarity import StreamDistances, linears_of, weight_distances


@pytest.mark.parametrize("variant", ["llama", "gpt_neox"])
@pytest.mark.parametrize("chunk", [2**24, 300])
def test_weights_are_as_far_apart_as_they_are(
    make_source, open_source, variant: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "CHUNK_NUMBERS", chunk)
    model, pieces, _ = open_source(make_source(variant))
    found = weight_distances(pieces, model.arch, torch.float32)
    assert set(found) == set(linears_of(model.arch))
    for name, canonical in linears_of(model.arch).items():
        weights = [pieces.read(canonical, layer, torch.float32).double() for layer in range(4)]
        for i, one in enumerate(weights):
            for j, other in enumerate(weights):
                whole = one.norm().square() + other.norm().square()
                expected = float((one - other).norm() / whole.sqrt())
                assert found[name][i][j] == pytest.approx(expected, abs=1e-6)
    # Independent weights have nothing in common.
    assert np.mean([table[0][1] for table in found.values()]) == pytest.approx(1.0, abs=0.1)


def test_streams_turn_by_the_angle_between_them(make_source, open_source) -> None:
    distances = StreamDistances(open_source(make_source("llama")).model.arch)
    x, y = torch.eye(32)[0], torch.eye(32)[1]
    for layer, stream in enumerate((x, 5 * x, x + y, y, -x)):
        distances.see(layer, stream.expand(2, 3, 32))
    found = np.array(distances.found())
    assert found[0] == pytest.approx([0, 0, 0.25, 0.5, 1.0], abs=1e-5)
    assert (found == found.T).all()


def test_a_sample_of_tokens_stands_for_streams_too_large_to_keep(
    make_source, open_source, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = open_source(make_source("llama")).model.arch
    monkeypatch.setattr(similarity, "STREAM_NUMBERS", 5 * 32 * 10)
    distances = StreamDistances(arch)
    torch.manual_seed(0)
    for layer in range(2):
        distances.see(layer, torch.randn(4, 16, 32))
    assert [len(each) for each in distances._streams] == [10, 10]
    assert 0.4 < distances.found()[0][1] < 0.6
