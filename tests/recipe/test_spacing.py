import numpy
import pytest

from refold.recipe.tying import evenly_spaced

# Written out by hand for the layer counts of the paper (Gemma 2B, TinyLlama, Pythia 1B) and of common models.
PAPER = [
    (6, 3, [0, 2, 5]),
    (18, 9, [0, 2, 4, 6, 8, 11, 13, 15, 17]),
    (18, 6, [0, 3, 7, 10, 14, 17]),
    (22, 11, [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21]),
    (16, 8, [0, 2, 4, 6, 9, 11, 13, 15]),
    (24, 12, [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]),
    (28, 14, [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]),
]


@pytest.mark.parametrize(("num_layers", "num_kept", "picks"), PAPER)
def test_picks_are_those_of_the_paper(num_layers, num_kept, picks):
    assert list(evenly_spaced(num_layers, num_kept)) == picks


def test_picks_are_numpys_for_every_size():
    for num_layers in range(1, 101):
        for num_kept in range(1, num_layers + 1):
            theirs = numpy.round(numpy.linspace(0, num_layers - 1, num_kept)).astype(int)
            assert list(evenly_spaced(num_layers, num_kept)) == list(theirs), (num_layers, num_kept)


def test_none_one_and_all():
    assert evenly_spaced(5, 0) == ()
    assert evenly_spaced(5, 1) == (0,)
    assert evenly_spaced(5, 5) == (0, 1, 2, 3, 4)
