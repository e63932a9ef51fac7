from refold.blueprint.origins import Origin
from refold.blueprint.tensors import target_tensors
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe


def _origins(arch, sections) -> dict[str, Origin]:
    blueprint, starts, _ = build_blueprint(arch, load_recipe(sections))
    return {tensor.name: tensor.origin(blueprint, starts) for tensor in target_tensors(blueprint)}


def test_the_identity_copies_every_tensor_from_its_own_layer(make_arch):
    found = _origins(make_arch(3), {})
    assert {each.how for each in found.values()} == {"copied"}
    assert found["model.mixers.2.q_proj.weight"] == Origin("copied", "mixer.q_proj.weight", (2,))
    assert found["model.embed_tokens.weight"] == Origin("copied", "embed_tokens.weight")
    assert found["lm_head.weight"] == Origin("copied", "lm_head.weight")
    assert found["model.norm.weight"] == Origin("copied", "norm.weight")


def test_the_papers_start_averages_and_factorises(make_arch):
    found = _origins(make_arch(4), {"fold": {"loops": 2}, "relax": {"rank": 2}})
    assert found["model.mixers.0.q_proj.weight"] == Origin("averaged", "mixer.q_proj.weight", (0, 2))
    assert found["model.mlps.1.input_norm.weight"] == Origin("averaged", "mlp.input_norm.weight", (1, 3))
    for half in "ab":
        assert found[f"model.depths.3.lora.up_proj.{half}"] == Origin("factorised", "mlp.up_proj.weight", (3,))


def test_a_depth_whose_layer_is_stored_has_nothing_to_correct(make_arch):
    found = _origins(make_arch(4), {"fold": {"loops": 2, "init": "lower"}, "relax": {"rank": 2}})
    assert found["model.depths.0.lora.q_proj.a"] == Origin("fresh", "mixer.q_proj.weight")
    assert found["model.depths.2.lora.q_proj.a"] == Origin("factorised", "mixer.q_proj.weight", (2,))


def test_a_joint_start_reads_all_tied_layers_for_weight_and_loras(make_arch):
    sections = {"fold": {"loops": 2}, "relax": {"rank": {"q_proj": 2}, "init": "joint", "vectors": "own"}}
    found = _origins(make_arch(4), sections)
    assert found["model.mixers.0.q_proj.weight"] == Origin("joint", "mixer.q_proj.weight", (0, 2))
    assert found["model.depths.2.lora.q_proj.b"] == Origin("joint", "mixer.q_proj.weight", (0, 2))
    # Without a LoRA there is nothing to fit together with.
    assert found["model.mixers.0.k_proj.weight"] == Origin("averaged", "mixer.k_proj.weight", (0, 2))
    assert found["model.depths.2.vectors.mixer.input_norm.weight"] == Origin("copied", "mixer.input_norm.weight", (2,))


def test_a_basis_and_its_coefficients_read_all_tied_layers(make_arch):
    factor = {"parameters": 0.5, "share": "basis"}
    found = _origins(make_arch(6), {"fold": {"loops": 2, "prelude": 1, "coda": 1}, "factor": factor})
    assert found["model.mixers.1.q_proj.a.weight"] == Origin("joint", "mixer.q_proj.weight", (1, 3))
    for depth in (1, 3):
        assert found[f"model.depths.{depth}.coefficients.q_proj"] == Origin("joint", "mixer.q_proj.weight", (1, 3))
    assert found["model.mixers.0.q_proj.a.weight"] == Origin("factorised", "mixer.q_proj.weight", (0,))
    assert found["model.depths.3.vectors.mlp.input_norm.weight"] == Origin("copied", "mlp.input_norm.weight", (3,))
    relaxed = _origins(make_arch(4), {"fold": {"loops": 2}, "relax": {"rank": 2}, "factor": factor})
    assert relaxed["model.depths.3.lora.q_proj.a"] == Origin("factorised", "mixer.q_proj.weight", (3,))
    scratch = _origins(make_arch(4), {"weights": "fresh", "fold": {"loops": 2}, "factor": factor})
    assert {each.how for each in scratch.values()} == {"fresh"}


def test_fresh_parts_and_their_loras_read_nothing(make_arch):
    found = _origins(make_arch(4), {"fold": {"loops": 2, "init": "random"}, "relax": {"rank": 2}})
    assert found["model.mixers.0.q_proj.weight"] == Origin("fresh", "mixer.q_proj.weight")
    assert found["model.depths.1.lora.q_proj.a"] == Origin("fresh", "mixer.q_proj.weight")
    assert found["model.embed_tokens.weight"].how == "copied"
    scratch = _origins(make_arch(4), {"weights": "fresh", "fold": {"loops": 2}, "relax": {"rank": 2, "vectors": "own"}})
    assert {each.how for each in scratch.values()} == {"fresh"}
