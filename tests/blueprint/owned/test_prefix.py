from refold.blueprint.origins import Origin
from refold.blueprint.owned.prefix import PREFIX
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe


def build(arch, **relax):
    return build_blueprint(arch, load_recipe({"fold": {"loops": 2}, **({"relax": relax} if relax else {})}))


def test_a_depth_has_one_matrix_of_vectors_that_does_not_decay(make_arch):
    blueprint, starts, notes = build(make_arch(4), type="prefix", length=3)
    (prefix,) = PREFIX.tensors(blueprint, 2)
    assert (prefix.name, prefix.shape) == ("model.depths.2.prefix", (3, 32))
    assert prefix.origin(blueprint, starts) == Origin("fresh", "prefix")
    assert (prefix.fill(blueprint).kind, prefix.fill(blueprint).low) == ("normal", 0.02)
    assert prefix.groups == {"adapters", "mixers"}
    assert not PREFIX.decays(prefix)
    assert not PREFIX.is_matrix(prefix)
    assert PREFIX.describe(blueprint, 2) == "prefix 3"
    assert PREFIX.notes(blueprint)[0] in map(str, notes)


def test_keys_and_values_are_kept_and_every_token_looks_at_them(make_arch):
    blueprint = build(make_arch(4), type="prefix", length=3).blueprint
    assert PREFIX.kept_elements(blueprint, 2) == 3 * 2 * 2 * 8
    assert PREFIX.flops(blueprint, 2) == 3 * 4 * 4 * 8


def test_a_prefix_rules_out_a_stock_model(make_arch):
    blueprint = build(make_arch(4), type="prefix", length=3).blueprint
    assert PREFIX.obstacle(blueprint) == ("attention to tokens alone", "depth 0 has a prefix")


def test_a_stack_without_prefixes_has_none_of_this(make_arch):
    blueprint = build(make_arch(4)).blueprint
    assert not list(PREFIX.tensors(blueprint, 2))
    assert PREFIX.describe(blueprint, 2) == ""
    assert PREFIX.notes(blueprint) == ()
    assert PREFIX.flops(blueprint, 2) == PREFIX.kept_elements(blueprint, 2) == 0
    assert PREFIX.obstacle(blueprint) is None
