"""Folders whose weights are stored as integers."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from refold.blueprint.cost import count_weight_bytes
from refold.blueprint.quantisation import holds_integers
from refold.checkpoint.folded_tensors import read_blueprint
from refold.checkpoint.headers import read_headers
from refold.checkpoint.reader import CheckpointReader
from refold.conversion.convert import ConvertOptions, convert
from refold.conversion.inspect import inspect
from refold.conversion.quantise import QuantiseOptions, quantise
from refold.conversion.rounding_pass import read_balanced
from refold.errors import FolderError, HealError, RecipeError, RefoldError
from refold.evaluation.evaluate import evaluate
from refold.evaluation.settings import EvaluationSettings
from refold.exporting.export import export
from refold.healing.heal import heal
from refold.modeling.load import load_model, load_tokenizer
from refold.modeling.packed_weights import PackSettings, pack_model
from refold.nn.rounding import round_weight
from refold.recipe.heal import HealStage

STRICT = {"fold": {"loops": 2}}
RELAXED = {"fold": {"loops": 2, "init": "average"}, "relax": {"rank": 4}}
LOW_RANK = {"factor": {"parameters": 0.7, "weight": "none"}}
BASES = {"fold": {"loops": 2}, "factor": {"parameters": 0.7, "share": "basis", "weight": "none"}}
RECIPES: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "strict": STRICT,
    "relaxed": RELAXED,
    "low-rank": LOW_RANK,
    "bases": BASES,
}
TEXT = [
    "The sea was calm that night, and the moon lay on it. " * 40,
    "It was the best of times, it was the worst. " * 40,
]


@pytest.fixture(scope="module")
def folds(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}
    source = make_model("llama", hidden_size=64, intermediate_size=96)

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("folds") / name
            convert(source, made[name], RECIPES[name], options=ConvertOptions(allow_larger=True))
        return made[name]

    return make


@pytest.fixture(scope="module")
def small(folds: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def make(name: str, to: str, **options: Any) -> Path:
        key = f"{name}-{to}-{options}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("small") / "model"
            quantise(folds(name), made[key], to, **options)
        return made[key]

    return make


def logits(folder: Path, ids: Tensor) -> Tensor:
    """In float32, with dequantised weights."""
    model: Any = load_model(folder, dtype="float32", device="cpu")
    model.hold_integers()
    with torch.no_grad():
        return model(ids).logits


IDS = torch.randint(3, 290, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "to"),
    [
        *((name, to) for name in RECIPES for to in ("int8", "int4")),
        ("relaxed", "int5zg64"),
        ("low-rank", "int3g128"),
        ("bases", "int2"),
    ],
)
def test_a_folder_is_the_float_model_with_rounded_weights(
    name: str, to: str, folds: Callable[[str], Path], small: Callable[..., Path]
) -> None:
    folder = small(name, to)
    before: Any = load_model(folds(name), dtype="float32", device="cpu")
    blueprint = read_blueprint("", json.loads((folder / "config.json").read_text()))
    assert holds_integers(blueprint)
    with CheckpointReader(folder, blueprint) as reader, torch.no_grad():
        floats = {weight_name: weight.clone() for weight_name, weight in before.named_parameters()}
        rounded = [weight_name for weight_name in floats if reader.scheme(weight_name) is not None]
        for weight_name, weight in before.named_parameters():
            scheme = reader.scheme(weight_name)
            found = reader.read(weight_name, torch.float32)
            if scheme is None:
                assert found.equal(weight)
            else:
                assert weight_name in rounded
                before_rounding = read_balanced(weight_name, rounded, floats.__getitem__)
                assert found.equal(round_weight(before_rounding, scheme, torch.ones(weight.shape[1])).dequantise())
            weight.copy_(found)
        expected = before(IDS).logits
    torch.testing.assert_close(logits(folder, IDS), expected, atol=1e-5, rtol=1e-5)
    headers = read_headers(folder)
    assert headers is not None
    assert headers.num_bytes == count_weight_bytes(blueprint, 4)
    assert inspect(folder).cost.target.weight_bytes == headers.num_bytes


@pytest.mark.parametrize("name", ["strict", "bases"])
def test_transformers_loads_and_saves_the_same_bits(name: str, small: Callable[..., Path], tmp_path: Path) -> None:
    folder = small(name, "int4")
    for dtype in (torch.float32, torch.bfloat16):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert model.dtype == dtype
        model.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
        model.save_pretrained(tmp_path / "saved")
        old, new = load_file(folder / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
        assert old.keys() == new.keys()
        integers = {key: value for key, value in old.items() if value.dtype != torch.float32}
        assert all(new[key].equal(value) and new[key].dtype == value.dtype for key, value in integers.items())


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize("name", ["strict", "relaxed", "low-rank", "bases"])
def test_packing_takes_the_integers_as_they_are(
    name: str, to: str, folds: Callable[[str], Path], small: Callable[..., Path]
) -> None:
    folder = small(name, to)
    expected = logits(folder, IDS)
    model: Any = load_model(folder, dtype="float32", device="cpu")
    sizes = pack_model(model, PackSettings(weights="float32"))
    if name in ("strict", "relaxed"):
        # Kernels refuse the ranks of the others, which are no multiples of 32.
        assert sizes.total < 1.1 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with torch.no_grad():
        found = model(IDS).logits
    # Activations are rounded to bfloat16.
    assert distance(found, expected) < 0.06
    if to == "int4":
        assert distance(found, expected) < 0.5 * distance(found, logits(folds(name), IDS))


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_feedback_on_text_is_nearer_than_plain(folds: Callable[[str], Path], small: Callable[..., Path]) -> None:
    options, folder = QuantiseOptions(context=64), folds("relaxed")
    ids = torch.tensor([load_tokenizer(folder)(TEXT[0])["input_ids"][:60]])
    plain, fed = small("relaxed", "int4"), small("relaxed", "int4", data=TEXT, tokens=2048, options=options)
    before = logits(folder, ids)
    assert distance(logits(fed, ids), before) < 0.9 * distance(logits(plain, ids), before)
    found = json.loads((fed / "provenance.json").read_text())
    assert [each["stage"] for each in found["stages"]] == ["convert", "quantise"]
    assert found["stages"][-1]["recipe"]["used"] == "feedback"


@pytest.mark.parametrize(("name", "to"), [("low-rank", "int3"), ("bases", "int4")])
def test_feedback_on_text_is_nearer_in_factors_too(
    name: str, to: str, folds: Callable[[str], Path], small: Callable[..., Path]
) -> None:
    folder, keep = folds(name), {"embeddings": "float"}
    if not read_blueprint("", json.loads((folder / "config.json").read_text())).arch.tied_head:
        keep["head"] = "float"
    ids = torch.tensor([load_tokenizer(folder)(TEXT[0])["input_ids"][:60]])
    plain = small(name, to, keep=keep)
    fed = small(name, to, keep=keep, data=TEXT, tokens=1024, options=QuantiseOptions(context=64))
    before = logits(folder, ids)
    assert distance(logits(fed, ids), before) < 0.9 * distance(logits(plain, ids), before)


def test_formats_by_layer_are_carried_out(folds: Callable[[str], Path], tmp_path: Path) -> None:
    layers = {"q_proj": ["int3g64", "float", "int2", "int2"], "down_proj": ["int6", "int5z", "int4", "int4"]}
    found = quantise(
        folds("strict"), tmp_path / "out", "int8", keep={"mlp": "int4"}, options=QuantiseOptions(layers=layers)
    )
    assert [each.quantised.get("q_proj") for each in found.blueprint.mixers] == ["int3g64", None]
    assert [each.quantised["down_proj"] for each in found.blueprint.mlps] == ["int6", "int5z"]
    assert {each.quantised["up_proj"] for each in found.blueprint.mlps} == {"int4"}
    assert logits(tmp_path / "out", IDS).isfinite().all()
    headers = read_headers(tmp_path / "out")
    assert headers is not None
    assert headers.num_bytes == found.weight_bytes


def test_a_source_becomes_the_empty_recipe_with_integers(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model("qwen2", hidden_size=64, intermediate_size=96)
    quantise(source, tmp_path / "whole", "int8")
    convert(source, tmp_path / "converted", {"quantise": {"to": "int8"}}, options=ConvertOptions(allow_larger=True))
    one, other = (load_file(tmp_path / each / "model.safetensors") for each in ("whole", "converted"))
    assert all(one[key].equal(other[key]) for key in one.keys() | other.keys())
    convert(source, tmp_path / "floats", {}, options=ConvertOptions(allow_larger=True))
    quantise(tmp_path / "floats", tmp_path / "again", "int8")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(one[key].equal(again[key]) for key in one.keys() | again.keys())


def test_weights_are_kept_by_name(folds: Callable[[str], Path], tmp_path: Path) -> None:
    keep = {"embeddings": "int4", "mlp": "float", "down_proj": "int8"}
    found = quantise(folds("strict"), tmp_path / "kept", "int4", keep=keep)
    assert found.blueprint.quantised == {"embedding": "int4", "head": "int8"}
    assert found.blueprint.mlps[0].quantised == {"down_proj": "int8"}
    assert set(found.blueprint.mixers[0].quantised.values()) == {"int4"}
    assert logits(tmp_path / "kept", IDS).isfinite().all()


def test_dense_exports_are_dequantised(small: Callable[..., Path], tmp_path: Path) -> None:
    folder = small("relaxed", "int4")
    export(folder, tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits(folder, IDS), atol=1e-4, rtol=1e-4)


def test_adapters_train_on_frozen_integers_and_integers_do_not(small: Callable[..., Path], tmp_path: Path) -> None:
    folder = small("relaxed", "int4")
    stage: dict[str, Any] = {"tokens": 512, "context": 32, "batch_tokens": 128, "objective": "next_token"}
    heal(folder, tmp_path / "healed", TEXT, [HealStage(**stage, train=("adapters",))])
    old, new = load_file(folder / "model.safetensors"), load_file(tmp_path / "healed" / "model.safetensors")
    assert old.keys() == new.keys()
    changed = {name for name in old if not new[name].equal(old[name])}
    assert changed == {name for name in old if ".lora." in name}
    with pytest.raises(HealError, match=r"train: weights of floats are required \(\d+ are stored as integers: lm_head"):
        heal(folder, tmp_path / "other", TEXT, [HealStage(**stage)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "int7"}, r"quantise.to: must be int8, or int2 to int6 .* \(got 'int7'\)"),
        ({"keep": {"qproj": "int8"}}, r"quantise.keep.qproj: must name embeddings, .*did you mean 'q_proj'"),
        ({"keep": {"q_proj": "int9"}}, r"quantise.keep.q_proj: must be float, int8, or int2 .* \(got 'int9'\)"),
        ({"keep": {"head": "int8"}, "name": "strict"}, r"quantise.keep.head: an untied head is required"),
        (
            {"keep": {"embeddings": "float", "mixer": "float", "mlp": "float"}},
            r"quantise.keep: a weight to quantise is required \(all are kept as float\)",
        ),
        (
            {"options": QuantiseOptions("feedback")},
            r"quantise.rounding: calibration text is required for feedback \(got none\)",
        ),
        ({"options": QuantiseOptions("plain"), "data": TEXT}, r"quantise.rounding: plain uses no text"),
    ],
)
def test_wrong_wishes_are_named(
    options: dict[str, Any], message: str, make_model: Callable[..., Path], folds: Callable[[str], Path], tmp_path: Path
) -> None:
    if "head" in options.get("keep", {}):
        convert(
            make_model("llama", tie_word_embeddings=True), tmp_path / "m", {}, options=ConvertOptions(allow_larger=True)
        )
    name = options.pop("name", None)
    model = tmp_path / "m" if name else folds("strict")
    if options.get("keep", {}).get("embeddings") == "float":
        options["keep"] = {**options["keep"], "head": "float"}
    with pytest.raises(RecipeError, match=message):
        quantise(model, tmp_path / "out", **{"to": "int8", **options})
    assert not (tmp_path / "out").exists()


def test_a_quantised_model_is_not_quantised_again(small: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"weights of floats are required \(got \d+ weights int8"):
        quantise(small("strict", "int8"), tmp_path / "out", "int4")
    with pytest.raises(RefoldError, match=r"quantise: weights of floats are required"):
        evaluate(small("strict", "int8"), TEXT, EvaluationSettings(quantise="int4", device="cpu"))


def test_folders_of_others_and_small_disks_are_respected(
    folds: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("mine")
    with pytest.raises(FolderError, match="it holds other files"):
        quantise(folds("strict"), tmp_path / "taken", "int8", options=QuantiseOptions(overwrite=True))
    with pytest.raises(FolderError, match="another place than the model's is required"):
        quantise(folds("strict"), folds("strict"), "int8", options=QuantiseOptions(overwrite=True))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(FolderError, match=r"\d+ bytes of disk are required \(free: 1000\)"):
        quantise(folds("strict"), tmp_path / "full", "int8")
    assert not (tmp_path / "full").exists()


def test_a_folder_with_integers_of_another_kind_is_torn(small: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(small("strict", "int8"), tmp_path / "torn")
    (tmp_path / "torn" / "manifest.json").unlink()
    with safe_open(tmp_path / "torn" / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in tensors if name.endswith("_packed"))
    save_file({**tensors, name: tensors[name].float()}, tmp_path / "torn" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FolderError, match=f"{name} has dtype F32, not I32"):
        load_model(tmp_path / "torn", device="cpu")


def test_the_vocabulary_of_integers_keeps_its_size(small: Callable[..., Path]) -> None:
    model: Any = load_model(small("strict", "int8"), device="cpu")
    with pytest.raises(RefoldError, match="an embedding and a head of floats are required"):
        model.resize_token_embeddings(400)
