from typing import Any

from refold.blueprint.origins import Origin
from refold.blueprint.owned.lora import LORA
from refold.blueprint.owned.merge import Merge
from refold.families.arch import ArchSpec
from refold.planning.build import Built, build_blueprint
from refold.recipe.load import load_recipe

FOLD = {"loops": 2}


def build(arch: ArchSpec, rank: int | dict[str, int] = 3, **relax: Any) -> Built:
    return build_blueprint(arch, load_recipe({"fold": FOLD, "relax": {"rank": rank, **relax}}))


def test_each_linear_with_a_rank_has_a_pair(make_arch):
    blueprint, starts, _ = build(make_arch(4), {"k_proj": 3, "down_proj": 5})
    found = list(LORA.tensors(blueprint, 2))
    assert [(each.name, each.shape, each.pool) for each in found] == [
        ("model.depths.2.lora.k_proj.a", (3, 32), "mixer"),
        ("model.depths.2.lora.k_proj.b", (16, 3), "mixer"),
        ("model.depths.2.lora.down_proj.a", (5, 80), "mlp"),
        ("model.depths.2.lora.down_proj.b", (32, 5), "mlp"),
    ]
    assert found[0].origin(blueprint, starts) == Origin("factorised", "mixer.k_proj.weight", (2,))
    assert [each.fill(blueprint).low for each in found] == [32**-0.5, 0.0, 80**-0.5, 0.0]
    assert {each.kind.line_name(each) for each in found[:2]} == {"model.depths.2.lora.k_proj.*"}
    assert LORA.describe(blueprint, 2) == "3..5"
    assert LORA.flops(blueprint, 2) == 2 * (3 * (16 + 32) + 5 * (32 + 80))


def test_pairs_train_as_adapters_and_as_matrices_of_their_pool(make_arch):
    blueprint = build(make_arch(4)).blueprint
    for each in LORA.tensors(blueprint, 0):
        assert each.groups == {"adapters", f"{each.pool}s"}
        assert LORA.is_matrix(each)
        assert LORA.decays(each)


def test_a_pair_adds_a_product_to_its_linear_alone(make_arch):
    blueprint = build(make_arch(4), {"k_proj": 3}).blueprint
    stored = Merge("model.mixers.0.k_proj.weight")
    pair = ("model.depths.2.lora.k_proj.a", "model.depths.2.lora.k_proj.b")
    assert LORA.merge(stored, blueprint, 2, "mixer", "k_proj.weight") == Merge(stored.stored, (pair,))
    for local in ("k_proj.bias", "v_proj.weight", "input_norm.weight"):
        assert LORA.merge(stored, blueprint, 2, "mixer", local) == stored


def test_only_pairs_that_stand_alone_are_quantised(make_arch):
    blueprint = build(make_arch(4)).blueprint
    pair = next(iter(LORA.tensors(blueprint, 0)))
    assert not LORA.is_quantised(blueprint, pair)
    alone = blueprint.mixers[0].model_copy(update={"factors": {"q_proj": 0}})
    blueprint = blueprint.model_copy(update={"mixers": (alone, *blueprint.mixers[1:])})
    assert LORA.is_quantised(blueprint, pair)
