import pytest

from refold.recipe.tying import TYING_INITS, TiedBlock, explicit

BLOCK = TiedBlock(layers=(1, 2, 3, 4, 5, 6), groups=((1, 4), (2, 5), (3, 6)))


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("stepwise", ((1,), (3,), (6,))),
        ("average", ((1, 4), (2, 5), (3, 6))),
        ("lower", ((1,), (2,), (3,))),
        ("upper", ((4,), (5,), (6,))),
        ("random", ((), (), ())),
    ],
)
def test_each_init_makes_its_choice_within_the_block(name, sources):
    assert TYING_INITS[name].sources(BLOCK) == sources


def test_an_explicit_list_names_one_layer_for_each_stored_layer():
    assert explicit((5, 0, 5)).sources(BLOCK) == ((5,), (0,), (5,))


def test_every_init_has_a_summary_and_the_address_of_its_paper():
    for name, init in TYING_INITS.items():
        assert init.name == name
        assert init.summary
        assert init.url.startswith("https://arxiv.org/abs/")
        assert len(init.sources(BLOCK)) == len(BLOCK.groups)
