from refold.blueprint.owned.exits import EXIT
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe

FULL = {"norm": "own", "head_rank": 3, "gate": True}


def build(arch, exits):
    return build_blueprint(arch, load_recipe({"fold": {"loops": 2}, "exits": exits})).blueprint


def test_matrices_of_exits_decay_and_norms_and_gate_biases_do_not(make_arch):
    blueprint = build(make_arch(4), FULL)
    found = {each.local: each for each in EXIT.tensors(blueprint, 1)}
    decaying = {local for local, each in found.items() if EXIT.decays(each)}
    assert decaying == {"lora.lm_head.a", "lora.lm_head.b", "gate.weight"}
    assert found.keys() - decaying == {"norm.weight", "gate.bias"}
    assert all(each.groups == {"exits"} for each in found.values())


def test_parts_of_exits_are_counted_apart_and_shown_in_a_column_of_their_own(make_arch):
    blueprint = build(make_arch(4), FULL)
    assert EXIT.place == EXIT.column + "s" == "exits"
    assert EXIT.describe(blueprint, 1) == "own norm, head rank 3, gate"
    assert EXIT.describe(blueprint, 0) == ""
    assert EXIT.flops(blueprint, 1) == 0


def test_a_sentence_says_that_a_stock_model_has_no_exits(make_arch):
    assert EXIT.lost(build(make_arch(4), {})) == ("a stock model has no early exits: they are dropped",)
    assert "their own norms, LoRAs and gates" in EXIT.lost(build(make_arch(4), FULL))[0]
    assert EXIT.lost(build_blueprint(make_arch(4), load_recipe({})).blueprint) == ()
