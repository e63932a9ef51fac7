"""The table of mixers, and the tables derived from it."""

import re
from typing import get_args

import pytest

from refold.errors import RecipeError
from refold.families.arch import ArchSpec
from refold.fields import describe_fields
from refold.mixers.placement import ENTRIES, AnyEntry, MixerEntry
from refold.mixers.registry import MIXERS, AnyMixer
from refold.nn.mixers.registry import MIXERS as MODULES
from refold.recipe.load import load_recipe


def test_sections_unions_and_modules_are_those_of_the_table() -> None:
    assert ENTRIES.keys() == MIXERS.keys() == MODULES.keys()
    for union, classes in ((AnyMixer, MIXERS), (AnyEntry, ENTRIES)):
        branches = get_args(get_args(union)[0])
        assert [get_args(branch)[0] for branch in branches] == list(classes.values())


@pytest.mark.parametrize("kind", MIXERS)
def test_a_section_has_the_mixers_options_and_the_placement(kind: str) -> None:
    options, placed = MIXERS[kind].model_fields.keys(), MixerEntry.model_fields.keys()
    assert not options & placed
    assert ENTRIES[kind].model_fields.keys() == options | placed
    assert ENTRIES[kind].__doc__ == MIXERS[kind].__doc__
    assert describe_fields(ENTRIES[kind]).keys() == ENTRIES[kind].model_fields.keys()
    recipe = load_recipe({"mixers": [{"type": kind, "depths": [1]}]})
    assert type(recipe.mixers[0].mixer()) is MIXERS[kind]


@pytest.mark.parametrize("kind", MIXERS)
def test_names_of_linears_have_no_dot_and_former_names_are_no_current_ones(kind: str, arch: ArchSpec) -> None:
    mixer = MIXERS[kind](type=kind).resolve(arch, "mixers[0]")  # pyright: ignore[reportCallIssue]
    linears, vectors = mixer.linears(arch), mixer.vectors(arch)
    assert not [name for name in linears if "." in name]
    for name in (*linears, *vectors):
        assert mixer.current_name(name) == name
    stored = {f"{name}.weight" for name in linears} | vectors.keys()
    for parts in mixer.foreign_names.values():
        assert stored.issuperset(parts)
    assert mixer.fills(arch).keys() <= vectors.keys()
    assert mixer.carried(arch).keys() >= {name for name in vectors if name.startswith("input_norm")}
    assert mixer.resolve(arch, "mixers[0]") == mixer


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "glaa"}, r"mixers\[0\]: type: must be one of .*did you mean 'gla'\?"),
        ({"decay_rank": 3}, r"mixers\[0\]: type: must be one of"),
        ("gla", r"mixers\[0\]: must be a mapping \(got 'gla'\)"),
        ({"type": "gla", "decay_rnk": 3}, r"mixers\[0\]\.decay_rnk: unknown key; did you mean 'decay_rank'\?"),
        ({"type": "gla", "dephts": [1]}, r"mixers\[0\]\.dephts: unknown key; did you mean 'depths'\?"),
        ({"type": "gla", "gate": "sigmoid"}, r"mixers\[0\]\.gate: must be one of silu, none \(got 'sigmoid'\)"),
    ],
)
def test_mistakes_name_no_internals(entry: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe({"mixers": [entry]})
    assert not re.search(r"_known|_tag|<|\bEntry|tagged", str(caught.value))
