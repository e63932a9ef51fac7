"""Conversion of whole folders: written files, and errors that leave no files."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from refold.checkpoint.folder import settle
from refold.checkpoint.locate import locate
from refold.checkpoint.manifest import verify
from refold.conversion.convert import ConvertOptions, carry_out, convert
from refold.conversion.target_tensors import TargetBuilder
from refold.data.readers import from_documents
from refold.errors import FolderError, RecipeError, RefoldError, SourceError
from refold.modeling.load import load_model
from refold.planning.plan import plan, read_plan

RELAXED = {"fold": {"loops": 2}, "relax": {"rank": 4, "vectors": "own"}}


@pytest.fixture
def source(make_source: Callable[..., Path], tmp_path: Path) -> Path:
    """A source of this test's own, which it may damage."""
    return Path(shutil.copytree(make_source("llama"), tmp_path / "source"))


@pytest.fixture
def sharded(source: Path) -> Path:
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"model-0000{number}-of-00002.safetensors": names[number - 1 :: 2] for number in (1, 2)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, source / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return source


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_stored_weights_are_the_mean_and_loras_what_it_lost(source, tmp_path):
    made = convert(source, tmp_path / "out", RELAXED, options=ConvertOptions(allow_larger=True))
    given, found = tensors_of(source), tensors_of(tmp_path / "out")
    for part in range(2):
        for linear in ("self_attn.q_proj", "mlp.down_proj"):
            own, short = "mixers" if "attn" in linear else "mlps", linear.split(".")[1]
            one, other = (given[f"model.layers.{layer}.{linear}.weight"] for layer in (part, part + 2))
            assert torch.allclose(found[f"model.{own}.{part}.{short}.weight"], (one + other) / 2, atol=1e-6)
            for depth, sign in ((part, 1), (part + 2, -1)):
                a, b = (found[f"model.depths.{depth}.lora.{short}.{kind}"] for kind in "ab")
                u, s, vh = torch.linalg.svd(sign * (one - other) / 2, full_matrices=False)
                assert torch.allclose(b @ a, (u[:, :4] * s[:4]) @ vh[:4], atol=1e-4)
                share = float(s[:4].square().sum() / s.square().sum())
                assert made.kept_energy[f"depths.{depth}.{short}"] == pytest.approx(share, abs=1e-4)
    for depth in range(4):
        own = found[f"model.depths.{depth}.vectors.mlp.input_norm.weight"]
        assert torch.equal(own, given[f"model.layers.{depth}.post_attention_layernorm.weight"])


def test_the_plan_has_the_energy_of_factors(source, tmp_path):
    made = convert(source, tmp_path / "out", {"factor": {"parameters": 0.5, "weight": "none"}})
    given = tensors_of(source)
    assert len(made.factor_energy) == 4 * 7
    for part in (0, 3):
        for linear, name in (
            ("self_attn.q_proj", f"mixers.{part}.q_proj"),
            ("mlp.down_proj", f"mlps.{part}.down_proj"),
        ):
            pool, _, short = name.split(".")
            rank = getattr(made.blueprint, pool)[part].factors[short]
            squares = torch.linalg.svdvals(given[f"model.layers.{part}.{linear}.weight"].double()).square()
            assert made.factor_energy[name] == pytest.approx(float(squares[:rank].sum() / squares.sum()), abs=1e-5)
            assert made.factor_energy[name] < 0.99
    assert made.kept_energy == {}
    assert read_plan(tmp_path / "out" / "plan.json").factor_energy == made.factor_energy


@pytest.mark.parametrize(("init", "sources"), [("stepwise", (0, 3)), ("lower", (0, 1)), ("upper", (2, 3))])
def test_strict_folds_copy_the_layers_of_their_init(source, tmp_path, init, sources):
    convert(source, tmp_path / "out", {"fold": {"loops": 2, "init": init}})
    given, found = tensors_of(source), tensors_of(tmp_path / "out")
    for part, layer in enumerate(sources):
        assert torch.equal(
            found[f"model.mlps.{part}.up_proj.weight"], given[f"model.layers.{layer}.mlp.up_proj.weight"]
        )
        norm = given[f"model.layers.{layer}.input_layernorm.weight"]
        assert torch.equal(found[f"model.mixers.{part}.input_norm.weight"], norm)


def test_fused_queries_keys_and_values_are_split_by_head(make_source, tmp_path):
    convert(make_source("gpt_neox"), tmp_path / "out")
    fused = tensors_of(make_source("gpt_neox"))["gpt_neox.layers.1.attention.query_key_value.weight"]
    found = tensors_of(tmp_path / "out")
    for head in range(4):
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = fused[head * 24 + index * 8 : head * 24 + (index + 1) * 8]
            assert torch.equal(found[f"model.mixers.1.{name}.weight"][head * 8 : (head + 1) * 8], rows)


def test_halves_of_bfloat16_are_averaged_in_float32(make_source, tmp_path):
    convert(make_source("llama", dtype="bfloat16"), tmp_path / "out", {"fold": {"loops": 4, "init": "average"}})
    given, found = tensors_of(make_source("llama", dtype="bfloat16")), tensors_of(tmp_path / "out")
    layers = [given[f"model.layers.{layer}.mlp.up_proj.weight"].float() for layer in range(4)]
    assert torch.equal(found["model.mlps.0.up_proj.weight"], torch.stack(layers).mean(0).bfloat16())


def test_two_conversions_give_the_same_bits_and_another_seed_others(source, tmp_path):
    recipe = {"fold": {"loops": 2, "init": "random"}, "relax": {"rank": 2}}
    for name, seed in (("one", 0), ("other", 0), ("third", 1)):
        convert(source, tmp_path / name, {**recipe, "seed": seed})
    one, other, third = (tensors_of(tmp_path / name) for name in ("one", "other", "third"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert not torch.equal(one["model.mlps.0.up_proj.weight"], third["model.mlps.0.up_proj.weight"])


def test_shards_give_what_one_file_gives(make_source, sharded, tmp_path):
    convert(sharded, tmp_path / "shards")
    convert(make_source("llama"), tmp_path / "single")
    single = tensors_of(tmp_path / "single")
    assert all(torch.equal(value, single[name]) for name, value in tensors_of(tmp_path / "shards").items())


def test_a_folder_holds_all_that_was_promised(source, tmp_path):
    told: list[tuple[int, int]] = []
    (source / "LICENSE").write_text("be kind")
    made = convert(
        source,
        tmp_path / "out",
        RELAXED,
        options=ConvertOptions(allow_larger=True, progress=lambda *at: told.append(at)),
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {"config.json", "model.safetensors", "plan.json", "provenance.json", "manifest.json", "README.md"}
    assert expected | {"LICENSE", "generation_config.json"} <= names
    verify(tmp_path / "out")
    assert read_plan(tmp_path / "out" / "plan.json") == made
    assert told[-1][0] == told[-1][1] == len(tensors_of(tmp_path / "out"))
    assert "the source has no tokenizer: none was copied" in map(str, made.notes)


def test_a_tokenizer_is_copied_without_a_word(material, tmp_path):
    made = convert(material / "models" / "stories260K", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not any("tokenizer" in note for note in map(str, made.notes))


def _drop(folder: Path, name: str) -> None:
    tensors = tensors_of(folder)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _add(folder: Path) -> None:
    save_file({**tensors_of(folder), "model.extra": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


def _pickle(folder: Path) -> None:
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _retype(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))


def _config_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


DAMAGE: list[tuple[Callable[[Path], object], type[RefoldError], str]] = [
    (_truncate, SourceError, r"model\.safetensors: truncated: \d+ bytes are required \(got \d+\)"),
    (lambda folder: _drop(folder, "model.norm.weight"), SourceError, r"1 required tensor missing: model\.norm\.weight"),
    (_add, SourceError, r"1 source tensor without a place: model\.extra; add them to `ignore_tensors`"),
    (_pickle, SourceError, r"pytorch_model\.bin"),
    (_retype, SourceError, r"model_type: must be one of llama, .*, phi3 \(got 'lama'\)"),
    (_config_only, SourceError, r"safetensors weights are required"),
]


def test_fresh_weights_need_none_of_the_source(source, tmp_path):
    recipe = {"weights": "fresh", "fold": {"loops": 2}, "relax": {"rank": 2}}
    convert(source, tmp_path / "whole", recipe)
    _config_only(source)
    convert(source, tmp_path / "config", recipe)
    whole, config = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "config")
    assert whole.keys() == config.keys()
    assert all(whole[name].equal(tensor.to(whole[name].dtype)) for name, tensor in config.items())
    text = from_documents(["some words to read " * 40])
    measured = {"weights": "fresh", "drop": {"block": {"count": 1, "by": "similarity"}}}
    with pytest.raises(SourceError, match="safetensors weights are required"):
        convert(source, tmp_path / "none", measured, calibration=text)


@pytest.mark.parametrize(("damage", "kind", "message"), DAMAGE, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_source_is_refused_and_leaves_nothing(source, tmp_path, damage, kind, message):
    damage(source)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind, match=message) as caught:
        convert(source, tmp_path / "deep" / "out")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_shard_is_named(sharded, tmp_path):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match=r"shard model-00002-of-00002\.safetensors is required \(missing\)"):
        convert(sharded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_left_out_with_a_reason_is_listed(source, tmp_path):
    _add(source)
    made = convert(source, tmp_path / "out", {"ignore_tensors": [{"name": "model.ex*", "reason": "a toy"}]})
    assert [line.reason for line in made.lines if line.how == "ignored"] == ["a toy"]


def test_an_existing_output_stays_unless_told_otherwise(source, tmp_path):
    convert(source, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(FolderError, match=r"a new folder is required .*--overwrite"):
        convert(source, tmp_path / "out", {"fold": {"loops": 2}})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    convert(source, tmp_path / "out", {"fold": {"loops": 2}}, options=ConvertOptions(overwrite=True))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FolderError, match="never overwritten"):
        convert(source, tmp_path / "mine", options=ConvertOptions(overwrite=True))


def test_a_folded_folder_is_no_source(source, tmp_path):
    convert(source, tmp_path / "out")
    with pytest.raises(SourceError, match="a transformers checkpoint is required"):
        convert(tmp_path / "out", tmp_path / "again")


def test_a_plan_is_carried_out_on_its_own_source_only(source, make_source, tmp_path):
    made = plan(source)
    with pytest.raises(SourceError, match=r"the source of the plan is required \(config\.json or weights differ\)"):
        carry_out(made, locate(make_source("gpt_neox")), tmp_path / "out")


def test_a_larger_target_has_to_be_allowed(source, tmp_path):
    with pytest.raises(RecipeError, match="larger than its source"):
        convert(source, tmp_path / "out", {"fold": {"loops": 2}, "relax": {"rank": "full"}})


def test_a_full_disk_leaves_nothing_behind(source, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system is required, which needs root: {mounted.stderr.strip()}")
    try:
        with pytest.raises(FolderError, match=r"bytes of disk are required|disk full"):
            convert(source, place / "out")
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", place], check=True)


def kill_at_random(processes: ForkServerContext, source: Path, folder: Path, times: int) -> None:
    """Overwrites a folder again and again and kills the writer on the way."""
    convert(source, folder / "out", {"fold": {"loops": 2, "init": "average"}})
    whole = {}
    for loops in (2, 4):
        convert(source, folder / f"loops{loops}", {"fold": {"loops": loops, "init": "average"}})
        whole[loops] = (folder / f"loops{loops}" / "model.safetensors").read_bytes()
    dice, killed, longest = random.Random(0), 0, 0.05
    for attempt in range(40 * times):
        recipe = {"fold": {"loops": 2 + attempt % 2 * 2, "init": "average"}}
        writer = processes.Process(
            target=convert,
            args=(source, folder / "out", recipe),
            kwargs={"options": ConvertOptions(overwrite=True)},
        )
        writer.start()
        started = time.monotonic()
        writer.join(dice.uniform(0, longest))
        if writer.is_alive():
            assert writer.pid is not None
            os.kill(writer.pid, signal.SIGKILL)
            killed += 1
        else:
            longest = max(0.01, time.monotonic() - started)
        writer.join()
        assert writer.exitcode in (0, -signal.SIGKILL)
        verify(settle(folder / "out"))
        assert (folder / "out" / "model.safetensors").read_bytes() in whole.values()
        assert sorted(path.name for path in folder.iterdir() if "lock" not in path.name) == ["loops2", "loops4", "out"]
        if killed == times:
            return
    pytest.fail(f"only {killed} of {times} writers were caught alive")


def test_a_kill_during_conversion_leaves_the_old_or_the_new_folder(processes, make_source, tmp_path):
    kill_at_random(processes, make_source("llama"), tmp_path, 3)


@pytest.mark.long
def test_twenty_kills_during_conversion_leave_the_old_or_the_new_folder(processes, make_source, tmp_path):
    kill_at_random(processes, make_source("llama"), tmp_path, 20)


@pytest.mark.parametrize("init", ["svd", "joint"])
@pytest.mark.parametrize("loops", [2, 4])
def test_pairs_of_a_bfloat16_source_correct_the_rounding_of_the_stored_weight(
    make_source, tmp_path, monkeypatch, init, loops
):
    source = make_source("llama", dtype="bfloat16")
    relax = {"rank": 48, "init": init, "vectors": "own"}
    recipe = {"fold": {"loops": loops, "init": "average"}, "relax": relax}
    convert(source, tmp_path / "out", recipe, options=ConvertOptions(allow_larger=True))
    linear_group = TargetBuilder.linear_group

    def to_unrounded(self, group):
        return replace(linear_group(self, group), dtype=torch.float32)

    monkeypatch.setattr(TargetBuilder, "linear_group", to_unrounded)
    convert(source, tmp_path / "unrounded", recipe, options=ConvertOptions(allow_larger=True))
    ids = torch.arange(96).reshape(4, 24)
    with torch.no_grad():
        wanted, *found = (
            load_model(folder, device="cpu", dtype="float32")(ids).logits
            for folder in (source, tmp_path / "out", tmp_path / "unrounded")
        )
    # Pairs are rounded too, which no start can correct.
    errors = [float((each - wanted).square().mean()) for each in found]
    assert errors[0] < 0.9 * errors[1]


def test_a_recipe_chooses_the_dtype_of_floats(source, tmp_path):
    made = convert(source, tmp_path / "folded", {"dtype": "bfloat16"})
    assert made.cost.target.weight_bytes * 2 == made.cost.source.weight_bytes
    assert {value.dtype for value in tensors_of(tmp_path / "folded").values()} == {torch.bfloat16}
    assert load_model(tmp_path / "folded", dtype=None).config.dtype == torch.bfloat16
