import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from refold.blueprint.cost import cost
from refold.blueprint.source_tensors import source_tensors
from refold.errors import RecipeError, RefoldError, SourceError
from refold.families.registry import find_family, read_arch
from refold.planning.build import identity_blueprint
from refold.planning.lines import PlanLine
from refold.planning.plan import StackPlan, plan, plan_all, read_plan
from refold.recipe.load import built_in_recipes
from refold.sources.source_model import read_source_model

CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
}
MakeSource = Callable[..., Path]


@pytest.fixture
def make_source(tmp_path: Path) -> MakeSource:
    """Makes a source folder whose weights are zeros; `edit` changes its tensors before they are written."""

    def make(edit: Callable[[dict[str, torch.Tensor]], object] | None = None, dtype=torch.bfloat16, **config) -> Path:
        folder = tmp_path / "source"
        folder.mkdir()
        raw = {**CONFIG, **config}
        (folder / "config.json").write_text(json.dumps(raw))
        expected = source_tensors(read_arch(raw), find_family(raw["model_type"]))
        tensors = {name: torch.zeros(each.shape, dtype=dtype) for name, each in expected.items()}
        if edit is not None:
            edit(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture
def config_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with a config.json and nothing else."""

    def make(**config) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **config}))
        return tmp_path

    return make


def _line(made: StackPlan, tensors: str, how: str) -> PlanLine:
    (line,) = [line for line in made.lines if (line.tensors, line.how) == (tensors, how)]
    return line


def test_the_identity_copies_all_and_costs_the_same(make_source):
    folder = make_source()
    made = plan(folder)
    assert {line.how for line in made.lines} == {"copied"}
    assert sum(line.count for line in made.lines) == 6 * 9 + 3
    assert made.cost.source == made.cost.target
    assert made.notes == ()
    assert not made.needs_healing
    assert made.source.path == str(folder.resolve())
    assert made.source.index_sha256
    assert (made.source.id, made.source.model_type, made.source.dtype) == (None, "llama", "bfloat16")


def test_a_plan_reads_back_as_it_was_written(make_source, tmp_path):
    folder = make_source()
    for name in built_in_recipes():
        made = plan(folder, name).settle()
        file = tmp_path / f"{name}.json"
        file.write_text(made.model_dump_json(indent=2))
        assert read_plan(file) == made
        assert json.loads(file.read_text())["format"] == 1


def test_a_plan_that_is_none_is_refused(tmp_path):
    with pytest.raises(RefoldError, match=r"a readable plan is required \(No such file"):
        read_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text('{"format": 2}')
    with pytest.raises(RefoldError, match=r"plan\.json: a plan of format 1 is required"):
        read_plan(tmp_path / "plan.json")


def test_lines_say_how_each_group_is_made_and_from_which_layers(make_source):
    folder = make_source()
    made = plan(folder, {"fold": {"loops": 2, "init": "lower"}, "relax": {"rank": 2}})
    assert _line(made, "model.mixers.*.q_proj.weight", "copied").layers == (0, 1, 2)
    factorised = _line(made, "model.depths.*.lora.q_proj.*", "factorised")
    assert (factorised.count, factorised.layers) == (6, (3, 4, 5))
    assert _line(made, "model.depths.*.lora.q_proj.*", "fresh").reason == "Gaussian A, zero B: nothing to correct"
    # The norms of layers 3 to 5 are read by nothing.
    dropped = _line(made, "model.layers.*.input_layernorm.weight", "dropped")
    assert (dropped.count, dropped.layers) == (3, (3, 4, 5))
    assert dropped.reason == "tied: the stored layer is initialised from other layers"


def test_lines_name_joint_averaged_and_zero_starts(make_source):
    folder = make_source()
    joint = plan(folder, "joint")
    assert _line(joint, "model.mixers.*.q_proj.weight", "joint").layers == (1, 2, 3, 4)
    assert _line(joint, "model.mixers.*.q_proj.weight", "copied").layers == (0, 5)
    relaxed = plan(folder, "relaxed")
    assert _line(relaxed, "model.mlps.*.up_proj.weight", "averaged").layers == tuple(range(6))
    zero = plan(folder, {"fold": {"loops": 2}, "relax": {"rank": 2, "init": "zero"}})
    assert _line(zero, "model.depths.*.lora.up_proj.*", "fresh").reason == "Gaussian A, zero B"
    random = plan(folder, {"fold": {"loops": 2, "init": "random"}})
    assert _line(random, "model.mlps.*.up_proj.weight", "fresh").reason == "fold.init: random"


def test_lines_say_why_a_source_tensor_is_dropped(make_source):
    folder = make_source()
    made = plan(folder, {"drop": {"block": {"layers": [1]}, "attention": {"layers": [2]}, "mlp": {"layers": [3]}}})
    reasons = {
        (line.reason, line.layers) for line in made.lines if line.how == "dropped" and line.tensors.count("proj")
    }
    assert reasons == {("layer dropped", (1,)), ("attention dropped", (2,)), ("MLP dropped", (3,))}
    scratch = plan(folder, "scratch")
    assert {line.reason for line in scratch.lines} == {"weights: fresh"}


@pytest.mark.parametrize("name", built_in_recipes())
def test_every_source_tensor_is_read_or_listed_and_every_target_tensor_is_made(make_source, name):
    from refold.blueprint.tensors import target_tensors

    made = plan(make_source(), name)
    arch = made.blueprint.arch
    read = {
        (found.canonical, layer)
        for tensor in target_tensors(made.blueprint)
        if (found := tensor.origin(made.blueprint, made.starts)).how != "fresh"
        for layer in found.layers or (None,)
    }
    unused = [
        each
        for each in source_tensors(arch, find_family("llama")).values()
        if not {(piece, each.layer) for piece in each.rule.pieces} & read
    ]
    assert sum(line.count for line in made.lines if line.how == "dropped") == len(unused)
    targets = len(list(target_tensors(made.blueprint)))
    assert sum(line.count for line in made.lines if line.how not in ("dropped", "ignored")) == targets


def test_lines_say_that_gains_have_no_effect_at_first(make_source):
    made = plan(make_source(), {"fold": {"loops": 2}, "relax": {"rank": 3, "gain": "own"}})
    lines = {line.tensors: line for line in made.lines}
    for pool in ("mixer", "mlp"):
        line = lines[f"model.depths.*.gain.{pool}.weight"]
        assert (line.how, line.count, line.reason) == (
            "fresh",
            made.blueprint.num_depths,
            "ones: without effect at first",
        )
    assert any(
        note.startswith(f"relax.gain: {made.blueprint.num_depths} depths scale") for note in map(str, made.notes)
    )


def test_lines_say_how_what_exits_have_of_their_own_begins(make_source):
    folder = make_source()
    exits = {"at": [0, 1], "norm": "own", "head_rank": 2, "gate": True}
    made = plan(folder, {"fold": {"loops": 2}, "exits": exits})
    norm = _line(made, "model.exits.*.norm.weight", "copied")
    assert (norm.count, norm.reason, norm.layers) == (2, "the final norm", ())
    lora = _line(made, "model.exits.*.lora.lm_head.*", "fresh")
    assert (lora.count, lora.reason) == (4, "Gaussian A, zero B: the exit begins with the shared head")
    gate = _line(made, "model.exits.*.gate.*", "fresh")
    assert (gate.count, gate.reason) == (4, "zeros: the gate begins at one half")
    assert any(
        note.startswith("exits after depth 0 and 1: own norm, head rank 2, gate") for note in map(str, made.notes)
    )
    scratch = plan(folder, {"weights": "fresh", "exits": {"at": [0], "norm": "own"}}, allow_larger=True)
    assert _line(scratch, "model.exits.*.norm.weight", "fresh").reason == "weights: fresh"


def test_fused_matrices_are_split_first(make_source):
    folder = make_source(model_type="gpt_neox")
    assert _line(plan(folder), "model.mixers.*.k_proj.weight", "split").reason == "split from query_key_value"
    averaged = _line(plan(folder, "relaxed"), "model.mixers.*.k_proj.bias", "averaged")
    assert averaged.reason == "split from query_key_value first"


def test_tensors_that_are_no_weights_are_ignored_with_the_reason(make_source):
    def add(tensors):
        for layer in range(6):
            tensors[f"gpt_neox.layers.{layer}.attention.bias"] = torch.zeros(4, dtype=torch.uint8)

    line = _line(plan(make_source(add, model_type="gpt_neox")), "gpt_neox.layers.*.attention.bias", "ignored")
    assert (line.count, line.reason) == (6, "a causal mask, not a weight")


def test_a_second_copy_of_a_tied_head_is_ignored(make_source):
    def add(tensors):
        tensors["lm_head.weight"] = torch.zeros(96, 32, dtype=torch.bfloat16)

    made = plan(make_source(add, tie_word_embeddings=True))
    assert _line(made, "lm_head.weight", "ignored").reason == "the head is the embedding (tie_word_embeddings)"


def test_a_tied_pair_may_be_stored_under_the_heads_name(make_source):
    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    folder = make_source(rename, tie_word_embeddings=True)
    assert {line.how for line in plan(folder).lines} == {"copied"}
    model = read_source_model(folder)
    assert model.locate("embed_tokens.weight").name == "lm_head.weight"
    assert model.locate("mixer.q_proj.weight", 2).name == "model.layers.2.self_attn.q_proj.weight"


def test_what_has_no_place_is_refused_until_the_recipe_gives_a_reason(make_source):
    def add(tensors):
        for layer in range(6):
            tensors[f"model.layers.{layer}.extra"] = torch.zeros(4)

    folder = make_source(add)
    with pytest.raises(SourceError, match=r"6 source tensors without a place: .*layers\.4\.extra, \.\.\.; add them to"):
        plan(folder)
    made = plan(folder, {"ignore_tensors": [{"name": "model.layers.*.extra", "reason": "a probe"}]})
    line = _line(made, "model.layers.*.extra", "ignored")
    assert (line.count, line.reason) == (6, "a probe")
    with pytest.raises(
        RecipeError, match=r"ignore_tensors\[0\]\.name: must match a source tensor \(got 'model\.extra'\)"
    ):
        plan(folder, {"ignore_tensors": [{"name": "model.extra", "reason": "a probe"}]})


@pytest.mark.parametrize(
    ("edit", "recipe", "message"),
    [
        (
            lambda tensors: tensors.pop("model.layers.5.mlp.up_proj.weight"),
            None,
            r"1 required tensor missing: model\.layers\.5\.mlp\.up_proj\.weight; complete the checkpoint",
        ),
        (
            lambda tensors: tensors.pop("lm_head.weight"),
            None,
            r"1 required tensor missing: lm_head\.weight; set tie_word_embeddings to true in config\.json if",
        ),
        (
            lambda tensors: None,
            {"ignore_tensors": [{"name": "model.norm.*", "reason": "no need"}]},
            r"1 required tensor missing: model\.norm\.weight; take them off `ignore_tensors`",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(33)}),
            None,
            r"model\.norm\.weight: shape \[32\] is required by config\.json \(got \[33\]\)",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}),
            None,
            r"model\.norm\.weight: dtype must be one of F64, F32, F16, BF16 \(got I8\)",
        ),
    ],
    ids=["missing", "no head", "ignored", "shape", "dtype"],
)
def test_a_checkpoint_that_is_not_what_its_config_says_is_refused(make_source, edit, recipe, message):
    with pytest.raises(SourceError, match=message):
        plan(make_source(edit), recipe)


def test_a_quantised_source_is_refused(config_folder):
    folder = config_folder(quantization_config={"quant_method": "gptq"})
    with pytest.raises(SourceError, match=r"plain float weights are required \(got a model quantised by gptq\)"):
        plan(folder)


def test_a_folded_model_is_no_source(config_folder):
    with pytest.raises(SourceError, match=r"a transformers checkpoint is required \(got a folder refold wrote\)"):
        plan(config_folder(model_type="refold"))


@pytest.mark.parametrize(
    ("config", "dtype", "dtype_bytes"),
    [
        ({}, "bfloat16", 2),
        ({"torch_dtype": "float32"}, "float32", 4),
        ({"dtype": "float16", "torch_dtype": "float32"}, "float16", 2),
    ],
)
def test_a_config_alone_can_be_planned(config_folder, config, dtype, dtype_bytes):
    made = plan(config_folder(**config), "relaxed")
    assert made.source.dtype == dtype
    assert made.source.index_sha256 is None
    assert made.cost.source == cost(identity_blueprint(made.blueprint.arch), dtype_bytes)


def test_a_dtype_that_weights_cannot_have_is_refused(config_folder):
    with pytest.raises(SourceError, match=r"dtype: must be one of float64, .* \(got 'int8'\)"):
        plan(config_folder(dtype="int8"))


def test_the_dtype_is_the_one_most_numbers_are_stored_in(make_source):
    def widen_norms(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()

    assert plan(make_source(widen_norms, dtype=torch.float16)).source.dtype == "float16"


def test_a_target_that_is_only_larger_is_refused_unless_asked_for(config_folder):
    folder = config_folder()
    recipe = {"fold": {"loops": 2}, "relax": {"rank": "full", "vectors": "own"}}
    with pytest.raises(
        RecipeError,
        match=r"would be larger than its source \(weight bytes [\d,]+ > [\d,]+\) and smaller in nothing; .*--allow",
    ):
        plan(folder, recipe)
    made = plan(folder, recipe, allow_larger=True)
    assert made.cost.target.parameters > made.cost.source.parameters
    # Full rank and own vectors give the source back.
    assert not made.needs_healing
    assert plan(folder, {**recipe, "relax": {"rank": "full"}}, allow_larger=True).needs_healing


def test_overrides_reach_the_recipe_and_its_defaults_are_resolved(config_folder):
    made = plan(config_folder(), "relaxed", ["relax.rank=2", "fold.loops=3"])
    assert made.recipe.fold is not None
    assert (made.recipe.fold.loops, made.recipe.fold.init) == (3, "average")
    assert made.starts.lora == "svd"
    assert made.blueprint.depths[0].ranks["q_proj"] == 2


def test_what_tying_does_not_save_is_said(config_folder):
    folder = config_folder()
    assert any("saves only weights" in note for note in map(str, plan(folder, "recursive").notes))
    assert not any("saves only weights" in note for note in map(str, plan(folder, "pruned").notes))


def test_all_built_ins_stand_side_by_side_with_the_reason_where_one_does_not_fit(config_folder):
    planned = {each.name: each for each in plan_all(config_folder(num_hidden_layers=2))}
    assert set(planned) == set(built_in_recipes())
    assert planned["joint"].plan is None
    assert "a block of at least 2 layers is required" in (planned["joint"].error or "")
    recursive = planned["recursive"].plan
    assert recursive is not None
    assert recursive.needs_healing
    rows = {row.quantity: row for row in recursive.summary(context=100)}
    assert rows["cache_bytes"].ratio == 1.0
    assert rows["weight_bytes"].target == recursive.cost.target.weight_bytes


def test_planning_a_70b_config_imports_neither_torch_nor_transformers(config_folder):
    folder = config_folder(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        num_hidden_layers=80,
    )
    code = (
        "import sys; from refold.planning.plan import plan, plan_all\n"
        f"plan({str(folder)!r}, 'relaxed'); plan_all({str(folder)!r})\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
