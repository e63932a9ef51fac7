"""An analysis ends with advice that follows from its measurements."""

import pytest

from refold.analysis.conclusion import conclude
from refold.analysis.figures import FIGURES
from refold.analysis.page import MEASURES, TITLES
from refold.sources.measurements import Influence, LinearSpectrum, Measurements, Similarity, TyingSpectra


def _found(block: tuple[float, ...], twins: float, lost: tuple[tuple[int, float], ...] = ()) -> Measurements:
    """Measurements of layers of which the first and the third have weights at a distance of `twins`."""
    size = len(block)
    far = [[0.0 if row == column else 0.99 for column in range(size)] for row in range(size)]
    far[0][2] = far[2][0] = twins
    table = tuple(map(tuple, far))
    spectra = tuple(
        TyingSpectra(
            pattern="cycle",
            loops=loops,
            groups=(),
            shares=(0.5,),
            linears={"q_proj": LinearSpectrum(lost=value, kept=(0.5,))},
        )
        for loops, value in lost
    )
    return Measurements.model_construct(
        influence=Influence(block=block, attention=block, mlp=block),
        similarity=Similarity(weights={"q_proj": table}, streams=table),
        spectra=spectra,
    )


def test_idle_layers_twins_and_the_best_tying_are_advised():
    told = conclude(_found((0.3, 0.01, 0.2, 0.001), 0.1, ((2, 0.2), (3, 0.3))))
    assert told[0].startswith("Layers 3, 1 change the stream by less than a third of the median: drop them first")
    assert "count: 2" in told[0]
    assert told[1] == "Layers with like weights, the first to be tied: 0 and 2."
    assert told[2].startswith("Tying by cycle with 2 loops loses 20%")
    assert "--set fold.loops=2" in told[2]


def test_nothing_that_stands_out_is_said_too():
    told = conclude(_found((0.3, 0.2, 0.25), 0.98, ((2, 0.5),)))
    assert told[0].startswith("No layer is idle")
    assert told[1].startswith("No two layers have like weights")
    assert "try the recipes `lowrank` and `compact` first" in told[2]
    assert len(conclude(_found((0.3, 0.2, 0.25), 0.98))) == 2


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_a_sentence(name):
    assert MEASURES[name].endswith(".")
    assert MEASURES[name].count(". ") == 0
    assert TITLES[name]
