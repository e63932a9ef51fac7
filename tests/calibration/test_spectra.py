"""Spectra of the residual that tying leaves, against plain decompositions."""

import pytest
import torch

from refold.calibration.similarity import linears_of
from refold.calibration.spectra import SHARES, tie_spectra, tyings


@pytest.mark.parametrize(
    ("pattern", "loops", "groups"),
    [
        ("cycle", 2, ((0, 2), (1, 3))),
        ("sequence", 2, ((0, 1), (2, 3))),
        ("cycle", 3, ((1, 2, 3),)),
        ("sequence", 3, ((1, 2, 3),)),
    ],
)
def test_kept_energy_is_that_of_the_truncated_residuals(make_source, open_source, pattern, loops, groups) -> None:
    model, pieces, _ = open_source(make_source("llama"))
    done: list[int] = []
    found = tie_spectra(pieces, model.arch, pattern, loops, progress=done.append)
    assert (found.groups, found.shares) == (groups, SHARES)
    assert done == [*range(1, 8)]
    for name, canonical in linears_of(model.arch).items():
        whole = lost = 0.0
        kept = [0.0] * len(SHARES)
        for group in groups:
            weights = torch.stack([pieces.read(canonical, layer, torch.float32) for layer in group]).double()
            for each, residual in zip(weights, weights - weights.mean(dim=0), strict=True):
                values = torch.linalg.svdvals(residual).square()
                whole, lost = whole + float(each.square().sum()), lost + float(values.sum())
                for index, share in enumerate(SHARES):
                    kept[index] += float(values[: max(1, round(share * len(values)))].sum())
        assert found.linears[name].lost == pytest.approx(lost / whole, rel=1e-4)
        assert found.linears[name].kept == pytest.approx([each / lost for each in kept], rel=1e-4)


def test_stacks_too_short_for_a_tying_are_not_tied_so() -> None:
    assert tyings(1) == []
    assert tyings(2) == [("cycle", 2), ("sequence", 2)]
    assert len(tyings(12)) == 4
