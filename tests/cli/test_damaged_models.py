"""Every command refuses a damaged model with one line before it computes anything."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from refold.analysis.analyse import AnalysisSettings, analyse
from refold.conversion.convert import ConvertOptions, convert
from refold.data.readers import from_documents
from refold.errors import RefoldError, SourceError
from refold.evaluation.evaluate import evaluate
from refold.evaluation.settings import EvaluationSettings
from refold.generation.generate import generate
from refold.healing.heal import heal
from refold.healing.run import HealOptions
from refold.planning.plan import plan
from refold.recipe.heal import HealStage
from refold.studies.job import RunSettings
from refold.studies.run import run

FOLD = {"fold": {"loops": 2, "init": "average", "uneven": "prelude"}}
STAGE = HealStage(tokens=64, batch_tokens=32, context=16)


@pytest.fixture(scope="module")
def text(sentences: tuple[str, ...]) -> Any:
    return from_documents(sentences * 4, name="sentences")


@pytest.fixture(scope="module")
def whole(make_model: Callable[..., Path]) -> Path:
    return make_model("llama")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(edit(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def ways(model: Path, whole: Path, out: Path, text: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every way in which a source's weights are read."""
    yield "convert", lambda: convert(model, out / "folded", FOLD)
    yield (
        "relaxed",
        lambda: convert(
            model, out / "folded", {**FOLD, "relax": {"rank": 2}}, options=ConvertOptions(allow_larger=True)
        ),
    )
    yield "analyse", lambda: analyse(model, out / "analysed", settings=AnalysisSettings(tokens=16, context=8))
    yield "evaluate", lambda: evaluate(model, text, EvaluationSettings(max_tokens=32, context=8))
    yield "against", lambda: evaluate(whole, text, EvaluationSettings(max_tokens=32, context=8), against=model)
    yield "generate", lambda: generate(model, "The sea")
    yield "heal", lambda: heal(model, out / "healed", text, STAGE, options=HealOptions(device="cpu"))
    distil = HealStage(tokens=64, batch_tokens=32, context=16, objective={"distil": {}})  # pyright: ignore
    yield "teacher", lambda: heal(whole, out / "healed", text, distil, teacher=model, options=HealOptions(device="cpu"))
    settings = RunSettings(tokens=64, baselines=(), eval_tokens=32, device="cpu")
    yield "run", lambda: run(model, out / "run", FOLD, text, held_out=text, settings=settings)


NAMES = ["convert", "relaxed", "analyse", "evaluate", "against", "generate", "heal", "teacher", "run"]


def refused(name: str, model: Path, whole: Path, tmp_path: Path, text: Any) -> str:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RefoldError) as caught:
        dict(ways(model, whole, out, text))[name]()
    assert "\n" not in str(caught.value)
    left = [path for path in out.iterdir() if not path.name.startswith(".")]
    assert left == [out / "run"] * (name == "run" and bool(left))
    return str(caught.value)


def test_an_intact_model_goes_every_way(model, whole, text, tmp_path):
    assert [name for name, _ in ways(model, whole, tmp_path, text)] == NAMES
    for name in ("evaluate", "generate", "heal"):
        dict(ways(model, whole, tmp_path, text))[name]()


@pytest.mark.parametrize("name", NAMES)
def test_a_wrapped_checkpoint_is_refused(name, model, whole, text, tmp_path):
    change(model, lambda tensors: {f"_orig_mod.{key}": value for key, value in tensors.items()})
    assert "names without the prefix `_orig_mod.` are required" in refused(name, model, whole, tmp_path, text)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_attention_is_refused(name, model, whole, text, tmp_path):
    change(model, lambda tensors: {key: value for key, value in tensors.items() if "layers.2.self_attn" not in key})
    found = refused(name, model, whole, tmp_path, text)
    assert "4 required tensors missing: model.layers.2.self_attn." in found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("layers", "message"), [(3, "9 source tensors without a place"), (5, "9 required tensors")])
def test_another_number_of_layers_is_refused(name, layers, message, model, whole, text, tmp_path):
    configure(model, num_hidden_layers=layers)
    assert message in refused(name, model, whole, tmp_path, text)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(name, value, model, whole, text, tmp_path):
    key = "model.layers.1.mlp.down_proj.weight"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key][3, 5] = value

    change(model, edit)
    assert f"{key}: finite numbers are required (got {value} at [3, 5])" in refused(name, model, whole, tmp_path, text)


@pytest.mark.parametrize("name", ["convert", "evaluate", "generate", "heal"])
def test_an_index_without_metadata_goes_every_way(name, model, whole, text, tmp_path):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    found = dict(ways(model, whole, tmp_path, text))[name]()
    if name == "evaluate":
        assert found.bits_per_byte == evaluate(whole, text, EvaluationSettings(max_tokens=32, context=8)).bits_per_byte
        assert found.model.name == str(model)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["cuda", "mps", "nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_one_line(name, device, model, whole, text, tmp_path):
    if torch.device("cuda" if "cuda" in device else "cpu").type == "cuda" and torch.cuda.is_available():
        pytest.skip("a machine without an accelerator is required")
    out = tmp_path / "out"
    stage, settings = STAGE, EvaluationSettings(max_tokens=32, context=8, device=device)
    calls: dict[str, Callable[[], Any]] = {
        "convert": lambda: convert(model, out, FOLD, options=ConvertOptions(device=device)),
        "relaxed": lambda: convert(
            model, out, {**FOLD, "relax": {"rank": 2}}, options=ConvertOptions(allow_larger=True, device=device)
        ),
        "analyse": lambda: analyse(model, out, settings=AnalysisSettings(tokens=16, context=8, device=device)),
        "evaluate": lambda: evaluate(model, text, settings),
        "against": lambda: evaluate(whole, text, settings, against=model),
        "generate": lambda: generate(model, "The sea", device=device),
        "heal": lambda: heal(model, out, text, stage, options=HealOptions(device=device)),
        "teacher": lambda: heal(whole, out, text, stage, teacher=model, options=HealOptions(device=device)),
        "run": lambda: run(model, out, FOLD, text, settings=RunSettings(tokens=64, device=device)),
    }
    with pytest.raises(RefoldError, match=r"device: one of this machine's devices is required \(got ") as caught:
        calls[name]()
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_a_run_in_a_place_that_cannot_be_written_is_one_line(model, text, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RefoldError, match="a writable place is required"):
        run(model, tmp_path / "file" / "out", FOLD, text, settings=RunSettings(tokens=64, device="cpu"))


class TestOwnHead:
    """A tied config beside a head of its own: transformers keeps both."""

    @pytest.fixture
    def tied(self, model: Path) -> Path:
        configure(model, tie_word_embeddings=True)
        return model

    def test_both_are_kept_with_a_note(self, tied, text, tmp_path):
        made = plan(tied)
        assert any("a different lm_head.weight is stored: both are kept" in note for note in map(str, made.notes))
        assert not made.blueprint.arch.tied_head
        convert(tied, tmp_path / "out")
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(stored["lm_head.weight"], load_file(tied / "model.safetensors")["lm_head.weight"])
        found = evaluate(tmp_path / "out", text, EvaluationSettings(max_tokens=64, context=16), against=tied)
        assert found.against is not None
        assert found.against.kl == pytest.approx(0, abs=1e-6)

    def test_equal_ones_are_tied(self, tied, text, tmp_path):
        change(tied, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
        made = plan(tied)
        assert made.blueprint.arch.tied_head
        assert not any("lm_head" in note for note in map(str, made.notes))
        convert(tied, tmp_path / "out")
        assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")

    def test_a_difference_in_the_last_row_counts(self, tied):
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors["lm_head.weight"][-1, -1] += 1

        change(tied, edit)
        assert not plan(tied).blueprint.arch.tied_head


@pytest.mark.parametrize(("said", "stored"), [("bfloat16", torch.float32), ("float32", torch.bfloat16)])
def test_the_stored_dtype_counts_everywhere(said, stored, model, whole, text, tmp_path):
    change(model, lambda tensors: {key: value.to(stored) for key, value in tensors.items()})
    configure(model, dtype=said)
    name, size = str(stored).removeprefix("torch."), stored.itemsize
    made = plan(model)
    assert made.source.dtype == name
    assert made.cost.source.weight_bytes == size * made.cost.source.parameters
    convert(model, tmp_path / "out")
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {stored}
    for folder in (model, tmp_path / "out"):
        found = evaluate(folder, text, EvaluationSettings(max_tokens=32, context=8))
        assert (found.model.dtype, found.model.weight_bytes) == (name, made.cost.source.weight_bytes)
    if stored == torch.float32:
        # The weights are not rounded to the dtype in the config.
        there = evaluate(whole, text, EvaluationSettings(max_tokens=32, context=8))
        assert evaluate(model, text, EvaluationSettings(max_tokens=32, context=8)).bits_per_byte == there.bits_per_byte
    heal(model, tmp_path / "healed", text, STAGE, options=HealOptions(device="cpu"))
    assert {value.dtype for value in load_file(tmp_path / "healed" / "model.safetensors").values()} == {stored}


def test_an_overflow_on_the_cast_is_named(model, tmp_path):
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for layer, sign in ((0, 1), (2, -1)):
            tensors[f"model.layers.{layer}.mlp.down_proj.weight"] *= 0
            tensors[f"model.layers.{layer}.mlp.down_proj.weight"] += sign * 65_000.0
        return {key: value.half() for key, value in tensors.items()}

    change(model, edit)
    recipe = {**FOLD, "relax": {"rank": 2}}
    message = r"lora\.down_proj\.b: finite numbers are required \(got -?inf at .*\); values above 65,504 overflow"
    with pytest.raises(RefoldError, match=message):
        convert(model, tmp_path / "out", recipe, options=ConvertOptions(allow_larger=True))
    assert not (tmp_path / "out").exists()


def test_a_model_whose_predictions_overflow_says_so(model):
    change(model, lambda tensors: {**tensors, "model.norm.weight": tensors["model.norm.weight"] * 2e4})
    with pytest.raises(RefoldError, match=r"finite predictions are required \(got (nan|inf) for token"):
        generate(model, "The sea", dtype="float16")


def test_a_source_changed_in_place_is_no_longer_the_teacher(model, text, tmp_path):
    convert(model, tmp_path / "folded", FOLD)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"] *= 1.01

    change(model, edit)
    distil = HealStage(tokens=64, batch_tokens=32, context=16, objective={"distil": {}})  # pyright: ignore
    with pytest.raises(SourceError, match=r"is required as it was converted \(config or weights changed since\)"):
        heal(tmp_path / "folded", tmp_path / "healed", text, distil, options=HealOptions(device="cpu"))


def test_a_fold_of_an_older_version_still_finds_its_teacher(model, text, tmp_path):
    convert(model, tmp_path / "folded", FOLD)
    path = tmp_path / "folded" / "provenance.json"
    history = json.loads(path.read_text())
    fingerprint = history["stages"][0]["source"]["fingerprint"]
    history["stages"][0]["source"]["fingerprint"] = {key: fingerprint[key] for key in ("config_sha256", "index_sha256")}
    path.write_text(json.dumps(history))
    (tmp_path / "folded" / "manifest.json").unlink()
    from refold.checkpoint.provenance import teacher

    assert teacher(tmp_path / "folded").path == model
