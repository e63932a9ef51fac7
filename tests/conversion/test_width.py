"""Narrower layers: kept units and refits against transformers' own activations, and every way they compose."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from refold.blueprint.schema import Blueprint
from refold.calibration.moments import MomentStore
from refold.calibration.weighting import INPUT_RIDGE
from refold.calibration.widths import width_losses
from refold.conversion.convert import ConvertOptions, convert
from refold.conversion.measured import keep_moments, pack_text
from refold.data.corpus import open_text
from refold.errors import RecipeError
from refold.exporting.registry import find_target
from refold.modeling.load import load_model
from refold.planning.plan import plan, read_plan
from refold.planning.widths import WidthCurve, allocate_widths
from refold.recipe.load import load_recipe
from refold.sources.source_model import read_source_model

SMALL = {"calibration": {"tokens": 512, "context": 32}}
LISTS = {"mlp": [48, 32, 16, 40], "heads": [1, 2, 4, 3]}
OPTIONS = ConvertOptions(allow_larger=True)


@pytest.fixture(scope="module")
def source(make_model: Callable[..., Path]) -> Path:
    return make_model("llama-mha-bias")


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(2, 95, (2, 24), generator=torch.Generator().manual_seed(7))


def logits_of(folder: Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return load_model(folder, device="cpu")(tokens).logits


def silenced(source: Path, folder: Path, kept: int, groups: int) -> Path:
    """The source, with all but the last `kept` neurons and `groups` heads of each layer without an effect."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, :-kept] = 0
            layer.self_attn.o_proj.weight[:, : -groups * 8] = 0
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


@pytest.mark.parametrize("weight", ["none", "activations", "fisher"])
def test_units_without_effect_leave_first_and_the_function_stays(source, text, tokens, tmp_path, weight):
    quiet = silenced(source, tmp_path / "quiet", 32, 2)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(quiet)(tokens).logits
    given = None if weight == "none" else text
    for count, is_same in ((32, True), (16, False)):
        out, width = tmp_path / f"out{count}", {"mlp": [count] * 4, "heads": [2] * 4, "weight": weight}
        convert(quiet, out, {**SMALL, "width": width}, calibration=given)
        gap = float((logits_of(out, tokens) - theirs).abs().max() / theirs.abs().max())
        assert (gap < 1e-4) == is_same, (count, gap)


def test_refits_are_least_squares_on_the_activations_of_transformers(source, text, tmp_path):
    recipe = {**SMALL, "width": {"mlp": [16] * 4, "heads": [2] * 4}}
    convert(source, tmp_path / "out", recipe, calibration=text)
    made = load_file(tmp_path / "out" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(source)
    layer, seen = model.model.layers[1], {}
    for name, linear in (("o_proj", layer.self_attn.o_proj), ("down_proj", layer.mlp.down_proj)):
        linear.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0].double()}))
    packed = pack_text(read_source_model(source), open_text(text), load_recipe(recipe))
    with torch.no_grad():
        model(packed.input_ids, position_ids=packed.position_ids)
    for linear, old, first, places in (
        ("down_proj", layer.mlp.down_proj.weight, "mlps.1.up_proj", layer.mlp.up_proj.weight),
        ("o_proj", layer.self_attn.o_proj.weight, "mixers.1.v_proj", layer.self_attn.v_proj.weight),
    ):
        kept = [int((places == row).all(dim=1).nonzero()) for row in made[f"model.{first}.weight"]]
        inputs = seen[linear].flatten(0, 1).detach()
        ridge = (INPUT_RIDGE * inputs.square().mean() * len(inputs)) ** 0.5
        rows = torch.cat([inputs, ridge * torch.eye(inputs.shape[1], dtype=torch.float64)])
        wanted = torch.linalg.lstsq(rows[:, kept], rows @ old.double().T).solution.T
        ours = made[f"model.{'mlps' if linear == 'down_proj' else 'mixers'}.1.{linear}.weight"].double()
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)
        # Control: the kept columns alone are another weight.
        assert (old[:, kept].double() - wanted).abs().max() > 0.05


RECIPES: dict[str, dict[str, Any]] = {
    "lists": {"width": {**LISTS, "weight": "none"}},
    "factors": {"width": {"mlp": 0.7, "heads": 0.5}, "factor": {"parameters": 0.4}},
    "measured ranks": {"width": {"mlp": 0.7}, "factor": {"parameters": 0.5, "split": "measured", "weight": "fisher"}},
    "integers": {"width": {"mlp": 0.7, "heads": 0.5}, "quantise": {"to": "int8"}},
    "tied": {"width": {"mlp": 0.7, "heads": 0.5}, "fold": {"loops": 2, "init": "average", "align": "both"}},
    "relaxed": {"width": {"mlp": 0.7, "heads": 0.5}, "fold": {"loops": 2}, "relax": {"rank": 3, "init": "joint"}},
    "basis": {"width": {"mlp": 0.7}, "fold": {"loops": 2}, "factor": {"parameters": 0.5, "share": "basis"}},
    "dropped": {"width": {**LISTS, "weight": "none"}, "drop": {"attention": {"layers": [1]}, "mlp": {"layers": [2]}}},
    "hybrid": {
        "width": {"mlp": 0.7, "heads": [4, 2, 4, 2]},
        "mixers": [{"type": "retention", "depths": [0]}, {"type": "linear_attention", "depths": [2]}],
    },
    "fresh": {"width": {"mlp": 0.7, "heads": 0.5}, "weights": "fresh"},
    "measured": {"width": {"mlp": 0.6, "heads": 0.75, "split": "measured", "multiple": 8, "weight": "fisher"}},
    "measured tied": {
        "width": {"mlp": 0.6, "heads": 0.75, "split": "measured", "multiple": 8},
        "fold": {"loops": 2, "init": "average"},
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_narrower_model_loads_generates_and_costs_what_its_files_hold(source, text, tokens, tmp_path, name):
    recipe = {**SMALL, **RECIPES[name]}
    needs_text = load_recipe(recipe).needs_text or name == "hybrid"
    convert(source, tmp_path / "out", recipe, options=OPTIONS, calibration=text if needs_text else None)
    made = read_plan(tmp_path / "out" / "plan.json")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert made.cost.target.weight_bytes == sum(each.numel() * each.element_size() for each in stored.values())
    model = load_model(tmp_path / "out", device="cpu")
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :9], use_cache=True)
        rest = model(tokens[:, 9:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(tmp_path / "again", tokens), whole)
    if name != "hybrid":
        cached = sum(
            each.keys.numel() + each.values.numel()
            for each in first.past_key_values.layers
            if getattr(each, "keys", None) is not None
        )
        assert made.cost.target.cache_bytes(24) == cached // len(tokens) * 4


def test_a_measured_split_keeps_the_budget_and_loses_less(source, text, tmp_path):
    width = {"mlp": 0.6, "heads": 0.75, "multiple": 8, "weight": "fisher"}
    keep_moments(source, {**SMALL, "width": width}, open_text(text), tmp_path / "moments")
    store, weights = MomentStore(tmp_path / "moments"), load_file(source / "model.safetensors")

    def predicted(neurons: list[int], heads: list[int]) -> float:
        found = 0.0
        for layer, (count, groups) in enumerate(zip(neurons, heads, strict=True)):
            for name, path, amount, of in (
                ("down_proj", "mlp.down_proj", count, None),
                ("o_proj", "self_attn.o_proj", groups, 4),
            ):
                weight = weights[f"model.layers.{layer}.{path}.weight"]
                found += width_losses({name: weight}, {name: store.read(layer, name)}, [amount], of)[0]
        return found

    losses, sizes = {}, {}
    for split in ("even", "measured"):
        made = convert(source, tmp_path / split, {**SMALL, "width": {**width, "split": split}}, calibration=text)
        neurons = [made.blueprint.part_arch("mlp", index).intermediate_size for index in range(4)]
        heads = [made.blueprint.part_arch("mixer", index).num_key_value_heads for index in range(4)]
        assert sum(neurons) * 3 + sum(heads) * 8 * 4 <= 0.6 * 4 * 48 * 3 + 0.75 * 4 * 4 * 8 * 4 + 1e-6
        sizes[split], losses[split] = (neurons, heads), predicted(neurons, heads)
    assert all(count % 8 == 0 for count in sizes["measured"][0])
    assert losses["measured"] < 0.98 * losses["even"]
    draft = plan(source, {**SMALL, "width": {**width, "split": "measured"}})
    assert any("widths are measured during conversion" in note.text for note in draft.pending)
    assert not [note for note in made.notes if "assumes even widths" in note.text]
    assert any(note.text.startswith("width.mlp: ") for note in made.notes)


def test_one_price_divides_a_budget_as_well_as_every_choice():
    curves = [
        WidthCurve(pool="mlp", part=0, counts=(8, 16, 24), losses=(9.0, 4.0, 0.0), unit=3),
        WidthCurve(pool="mlp", part=1, counts=(8, 16, 24), losses=(2.0, 0.5, 0.0), unit=3),
        WidthCurve(pool="mixer", part=0, counts=(1, 2), losses=(6.0, 0.0), unit=40),
    ]
    for budget in (100, 120, 150, 184, 224):
        options = [
            (one.losses[i] + two.losses[j] + three.losses[k], [one.counts[i], two.counts[j], three.counts[k]])
            for one, two, three in [curves]
            for i in range(3)
            for j in range(3)
            for k in range(2)
            if 3 * (one.counts[i] + two.counts[j]) + 40 * three.counts[k] <= budget
        ]
        best = min(options)[0]
        found = allocate_widths(curves, budget)
        assert 3 * (found[0] + found[1]) + 40 * found[2] <= budget
        lost = sum(curve.losses[curve.counts.index(count)] for curve, count in zip(curves, found, strict=True))
        assert lost <= best + 2.5, (budget, found)
    assert allocate_widths(curves, 224) == [24, 24, 2]
    with pytest.raises(RecipeError, match=r"width: at least 88 parameters are required .*raise the shares"):
        allocate_widths(curves, 80)


ERRORS = {
    "neither": ({}, r"width: mlp or heads is required \(got neither\); give a share"),
    "list and measured": ({"mlp": [8] * 4, "split": "measured"}, r"split: measured divides shares \(mlp is a list\)"),
    "length": ({"mlp": [8] * 3}, r"width\.mlp: one entry for each of the source's 4 layers is required \(got 3\)"),
    "too many": (
        {"heads": [4, 4, 5, 4]},
        r"width\.heads: at most 4, as in the source, is required \(got 5 for layer 2",
    ),
    "share": ({"mlp": 1.5}, r"width\.mlp: must be at most 1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_widths_are_refused_by_name(source, name):
    width, message = ERRORS[name]
    with pytest.raises(RecipeError, match=message):
        plan(source, {"width": width})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"width": {"heads": 0.5}, "mixers": [{"type": "retention", "depths": [1]}]},
            r"width\.heads: the source's attention is required for fewer heads \(got retention\) at depth 1; list",
        ),
        (
            {"width": {"heads": [4, 3, 4, 4]}, "share_kv": [{"depth": 3, "from": 1}]},
            r"width\.heads: all key-value heads are required where share_kv shares them \(got fewer at depth 1\)",
        ),
        (
            {"width": {"mlp": 0.7}, "fold": {"loops": 2, "init": [0, 0]}},
            r"width\.mlp: stored layers that are made from the layers tied to them are required \(layer 0 belongs",
        ),
    ],
)
def test_sections_that_do_not_go_with_a_width_are_refused_by_name(source, sections, message):
    with pytest.raises(RecipeError, match=message):
        plan(source, sections, allow_larger=True)


def test_heads_under_a_norm_over_all_of_them_are_refused(make_source):
    with pytest.raises(RecipeError, match=r"a norm over each head alone is required for fewer heads \(olmo2"):
        plan(make_source("olmo2"), {"width": {"heads": 0.5}})


def test_text_is_required_and_a_recipe_by_norms_needs_none(source, tmp_path):
    with pytest.raises(RecipeError, match=r"set relax\.weight, factor\.weight and width\.weight to none"):
        convert(source, tmp_path / "out", {"width": {"mlp": 0.7}})
    assert plan(source, {"width": {"mlp": 0.7, "weight": "none"}}).calibration == "unused"


def test_blueprints_with_impossible_sizes_are_refused(source):
    good = plan(source, {"width": {"mlp": 0.7, "heads": 0.5, "weight": "none"}}).blueprint.model_dump()
    for pool, size, value, message in (
        ("mlps", "intermediate_size", 48, r"mlps\[0\]\.intermediate_size: a number below the source's 48 is required"),
        ("mixers", "num_key_value_heads", 4, r"mixers\[0\]\.num_key_value_heads: a number below the source's 4"),
    ):
        wrong = {**good, pool: [{**good[pool][0], size: value}, *good[pool][1:]]}
        with pytest.raises(ValueError, match=message):
            Blueprint.model_validate(wrong)
    reads = [*good["depths"][:3], {**good["depths"][3], "kv": [{"depth": 1, "heads": [0]}]}]
    with pytest.raises(ValueError, match=r"depths\[3\]\.kv: all key-value heads of the source are required"):
        Blueprint.model_validate({**good, "depths": reads})
    hybrid = plan(source, {"mixers": [{"type": "retention", "depths": [0]}]}, allow_larger=True).blueprint.model_dump()
    narrow = {**hybrid["mixers"][0], "num_key_value_heads": 2}
    with pytest.raises(ValueError, match=r"the source's attention is required for fewer heads \(got retention\)"):
        Blueprint.model_validate({**hybrid, "mixers": [narrow, *hybrid["mixers"][1:]]})


def test_formats_that_cannot_hold_different_widths_say_so(source, make_source):
    recipe = {"width": {**LISTS, "weight": "none"}, "relax": {"rank": 2, "at": "all", "init": "zero"}}
    narrow = plan(source, recipe, allow_larger=True).blueprint
    for target in ("peft", "gguf-lora"):
        verdict = find_target(target).judge(narrow)
        assert verdict.status == "impossible"
        assert any("the same number of neurons at every depth" in each for each in verdict.reasons)
    said = " ".join(find_target("dense").judge(narrow).reasons)
    assert "narrower MLPs are padded with zeros to the widest (16 to 48)" in said
    for width, message in (
        ({"mlp": [48, 32, 48, 48]}, "MLPs whose width is a multiple of 256 (got 32)"),
        ({"heads": [1, 2, 2, 2]}, "the same number of key-value heads at every depth (got 1, 2)"),
    ):
        made = plan(make_source("llama"), {"width": {**width, "weight": "none"}}).blueprint
        assert message in find_target("nemotron-nas").judge(made).reasons


def test_lines_of_the_plan_name_kept_units(source):
    lines = plan(source, {"width": {"mlp": 0.7, "heads": 0.5, "weight": "fisher"}}).lines
    reasons = {line.tensors: line.reason for line in lines}
    assert reasons["model.mlps.*.up_proj.weight"] == "of the kept neurons"
    assert reasons["model.mlps.*.down_proj.weight"] == "refitted to the kept neurons, weighted by fisher"
    assert reasons["model.mixers.*.o_proj.weight"] == "refitted to the kept key-value heads, weighted by fisher"
