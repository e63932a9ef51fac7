"""Recipes written from choices."""

from collections.abc import Mapping
from typing import Any

import pytest

from refold.blueprint.schema import Pool
from refold.errors import RecipeError
from refold.families.arch import ArchSpec, Layer, Norm
from refold.fitting.kinds.kind import PartKind
from refold.fitting.menu import ChosenPart, Costs, FitChoice, MatrixForm, PartForm, TieForm
from refold.fitting.write_recipe import recipe_of, recipe_text
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe
from refold.recipe.yaml import parse_yaml

NUM_LAYERS = 4
LINEARS: Mapping[Pool, tuple[str, ...]] = {
    "mixer": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
ARCH = ArchSpec(
    family="llama",
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    layers=(Layer(),) * NUM_LAYERS,
    norm=Norm(),
    activation="silu",
    attention_scale=8**-0.5,
)
WHOLE = PartForm(kind="whole", loss=0.0, costs=Costs())
DROP = PartForm(kind="drop", loss=1.0, costs=Costs())


class Dropped(PartKind):
    name = "drop"
    pools = ("mixer", "mlp")

    def write(self, recipe: dict[str, Any], arch: ArchSpec, chosen: Mapping[int, PartForm], pool: Pool) -> None:
        key = {"mixer": "attention", "mlp": "mlp"}[pool]
        recipe.setdefault("drop", {})[key] = {"layers": list(chosen)}


KINDS = (Dropped(),)


def form(scheme: str | None = None, rank: int | None = None) -> MatrixForm:
    return MatrixForm(rank=rank, scheme=scheme, loss=0.0, costs=Costs())


def make_choice(
    stored: Mapping[tuple[int, str], MatrixForm],
    dropped: tuple[tuple[int, Pool], ...] = (),
    ties: tuple[TieForm, ...] = (),
    embedding: MatrixForm | None = None,
) -> FitChoice:
    parts = []
    tied = [(layer, tie.pool) for tie in ties for layer in tie.layers]
    for layer in range(NUM_LAYERS):
        for pool, names in LINEARS.items():
            if (layer, pool) in dropped:
                parts.append(ChosenPart(layer, pool, DROP, {}))
            elif (layer, pool) not in tied:
                forms = {name: stored.get((layer, name), form()) for name in names}
                parts.append(ChosenPart(layer, pool, WHOLE, forms))
    shared = tuple(
        (tie, {name: stored.get((tie.layers[0], name), form()) for name in LINEARS[tie.pool]}) for tie in ties
    )
    return FitChoice(tuple(parts), shared, {"embedding": embedding or form()}, 0.1, {}, Costs())


def every(scheme: str, **others: str) -> dict[tuple[int, str], MatrixForm]:
    names = [name for pool in LINEARS.values() for name in pool]
    return {(layer, name): form(others.get(name, scheme)) for layer in range(NUM_LAYERS) for name in names}


def test_nothing_chosen_is_an_empty_recipe() -> None:
    assert recipe_of(make_choice({}), ARCH, kinds=KINDS) == {}


def test_one_scheme_everywhere_is_written_once() -> None:
    made = recipe_of(make_choice(every("int4", down_proj="int8"), embedding=form("int8")), ARCH, kinds=KINDS)
    assert made == {"quantise": {"to": "int4", "keep": {"down_proj": "int8"}}}


def test_floats_beside_integers_are_kept() -> None:
    made = recipe_of(make_choice({}, embedding=form("int4")), ARCH, kinds=KINDS)
    assert made == {"quantise": {"to": "int8", "keep": {"embeddings": "int4", "mixer": "float", "mlp": "float"}}}


def test_a_pool_with_one_scheme_is_written_once() -> None:
    attention = dict.fromkeys(LINEARS["mixer"], "int8")
    made = recipe_of(make_choice(every("int4", **attention), embedding=form("int8")), ARCH, kinds=KINDS)
    assert made == {"quantise": {"to": "int8", "keep": {"mlp": "int4"}}}
    stored = every("int8")
    stored.update({(layer, "up_proj"): form() for layer in range(NUM_LAYERS)})
    made = recipe_of(make_choice(stored, embedding=form("int8")), ARCH, kinds=KINDS)
    assert made == {"quantise": {"to": "int8", "keep": {"up_proj": "float"}}}


def test_schemes_and_ranks_that_differ_are_lists_of_all_layers() -> None:
    stored = every("int4")
    stored[1, "q_proj"] = form("int8")
    stored[2, "q_proj"] = form("int4", rank=16)
    stored[3, "up_proj"] = form(rank=24)
    choice = make_choice(stored, dropped=((0, "mlp"), (3, "mixer")))
    made = recipe_of(choice, ARCH, "For a budget", KINDS)
    assert list(made) == ["description", "factor", "drop", "quantise"]
    assert made["description"] == "For a budget"
    assert made["drop"] == {"attention": {"layers": [3]}, "mlp": {"layers": [0]}}
    assert made["factor"] == {
        "ranks": {"q_proj": ["full", "full", 16, "full"], "up_proj": ["full", "full", "full", 24]},
        "weight": "fisher",
    }
    # Layers without the linear have the most frequent entry.
    assert made["quantise"] == {
        "to": "int4",
        "keep": {"embeddings": "float"},
        "layers": {"q_proj": ["int4", "int8", "int4", "int4"], "up_proj": ["int4", "int4", "int4", "float"]},
    }


def test_ties_are_groups_and_both_layers_have_the_entry_of_the_shared_matrix() -> None:
    def tie(pool: Pool, *layers: int) -> TieForm:
        return TieForm(pool=pool, layers=(layers[0], layers[1]), loss=0.1, costs=Costs(), matrices=())

    ties = (tie("mlp", 1, 2), tie("mixer", 1, 2), tie("mlp", 0, 3))
    stored = every("int4")
    stored[1, "up_proj"] = form("int8", rank=8)
    made = recipe_of(make_choice(stored, ties=ties, embedding=form("int8")), ARCH, kinds=KINDS)
    assert made["fold"]["groups"] == [
        {"layers": [0, 3], "tie": ["mlp"]},
        {"layers": [1, 2], "tie": ["mixer", "mlp"]},
    ]
    assert made["relax"] == {"rank": 0, "init": "svd", "vectors": "own", "weight": "fisher"}
    assert made["factor"]["ranks"] == {"up_proj": ["full", 8, 8, "full"]}
    assert made["quantise"]["layers"] == {"up_proj": ["int4", "int8", "int8", "int4"]}


def test_the_text_reads_back_to_the_same_recipe(tmp_path: Any) -> None:
    choice = make_choice(every("int4", q_proj="int8"), dropped=((2, "mixer"),), embedding=form("int4"))
    recipe = recipe_of(choice, ARCH, "bytes 35%: ties # and colons", KINDS)
    text = recipe_text(recipe, ["Budget: bytes 35%, cache 25%.", "predicted loss\n0.01 nats " + "and more " * 30])
    assert text.startswith("# Budget: bytes 35%, cache 25%.\n# predicted loss 0.01 nats and more")
    assert max(map(len, text.splitlines())) <= 100
    assert parse_yaml(text, "recipe") == recipe
    path = tmp_path / "fit.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_recipe(path) == load_recipe(recipe)
    assert load_recipe(path).description == "bytes 35%: ties # and colons"


def test_lists_of_layers_are_one_flow_of_values() -> None:
    ranks = [64, "full"] * 40
    text = recipe_text(
        {"factor": {"ranks": {"q_proj": ranks}}, "fold": {"groups": [{"layers": [3, 4], "tie": ["mlp"]}]}}
    )
    assert parse_yaml(text, "recipe")["factor"]["ranks"]["q_proj"] == ranks
    assert len(text.splitlines()) < 12
    assert "- {layers: [3, 4], tie: [mlp]}" in text or "[{layers: [3, 4], tie: [mlp]}]" in text


def test_a_part_that_is_dropped_without_a_map_gets_none_beside_one_with_a_map() -> None:
    map_form = PartForm(kind="replace", loss=0.1, costs=Costs(), needs="projection")
    chosen = {(0, "mixer"): DROP, (2, "mixer"): map_form, (3, "mlp"): map_form}
    parts = tuple(
        ChosenPart(layer=layer, pool=pool, form=chosen.get((layer, pool), WHOLE), matrices={})
        for layer in range(4)
        for pool in ("mixer", "mlp")
    )
    choice = FitChoice(parts=parts, ties=(), outer={}, loss=0.0, losses={}, costs=Costs())
    drop = recipe_of(choice, ARCH)["drop"]
    assert drop == {
        "attention": {"layers": [0, 2], "replace": [2]},
        "mlp": {"layers": [3], "replace": "linear"},
    }
    starts = build_blueprint(ARCH, load_recipe({"drop": drop}), None).starts
    assert [each.gone for each in starts.replacements] == [((2, "mixer"),), ((3, "mlp"),)]
    drop["attention"]["replace"] = "linear"
    with pytest.raises(RecipeError, match="at the beginning of the stack"):
        build_blueprint(ARCH, load_recipe({"drop": drop}), None)
