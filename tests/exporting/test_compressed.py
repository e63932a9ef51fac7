"""Dense exports with packed linears, loaded by transformers and compressed-tensors without refold."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from refold.conversion.convert import ConvertOptions, convert
from refold.conversion.quantise import quantise
from refold.errors import ExportError
from refold.exporting.export import export
from refold.modeling.load import load_model

FOLD = {"fold": {"loops": 2}}
SIZES = {"hidden_size": 64, "intermediate_size": 96}
IDS = torch.randint(2, 95, (2, 12), generator=torch.Generator().manual_seed(7))
LOADS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert not any(name.split(".")[0] == "refold" for name in sys.modules)
torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
"""


def logits_without_refold(folder: Path, scratch: Path) -> Tensor:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    torch.save(IDS, scratch / "ids.pt")
    places = [str(folder), str(scratch / "ids.pt"), str(scratch / "logits.pt")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", LOADS, *places]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(scratch / "logits.pt")


def exact_logits(folder: Path) -> Tensor:
    model: Any = load_model(folder, dtype="float32", device="cpu")
    model.hold_integers()
    with torch.no_grad():
        return model(IDS).logits


def small_fold(
    source: Path, folder: Path, to: str, keep: Mapping[str, str] | None = None, recipe: Mapping[str, Any] = FOLD
) -> Path:
    convert(source, folder / "folded", recipe, options=ConvertOptions(allow_larger=True))
    quantise(folder / "folded", folder / "small", to, keep=keep)
    return folder / "small"


@pytest.mark.parametrize(
    ("variant", "to", "own", "keep"),
    [
        ("llama", "int8", {}, {}),
        ("llama", "int4", {"down_proj": "int8"}, {"down_proj": "int8"}),
        ("gpt_neox", "int4", {}, {}),
        ("phi3", "int8", {}, {"gate_up_proj": "float"}),
    ],
)
def test_stored_integers_are_copied_and_give_the_same_logits_elsewhere(
    make_source: Callable[..., Path], variant: str, to: str, own: dict, keep: dict, tmp_path: Path
) -> None:
    small = small_fold(make_source(variant, **SIZES), tmp_path, to, own)
    export(small, tmp_path / "dense", quantise=to, keep=keep)
    ours, theirs = exact_logits(small), logits_without_refold(tmp_path / "dense", tmp_path)
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(ours.abs().max())
    assert "of them as the model stores them" in (tmp_path / "dense" / "README.md").read_text()


def test_other_integers_give_other_logits(make_source: Callable[..., Path], tmp_path: Path) -> None:
    small = small_fold(make_source("llama", **SIZES), tmp_path, "int4")
    export(small, tmp_path / "dense", quantise="int4")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("_packed"))
    save_file({**tensors, name: tensors[name] ^ 0x44444444}, path, {"format": "pt"})
    ours, theirs = exact_logits(small), logits_without_refold(tmp_path / "dense", tmp_path)
    assert float((ours - theirs).abs().max()) > 1e-2 * float(ours.abs().max())


def test_merged_weights_are_rounded_anew(make_source: Callable[..., Path], tmp_path: Path) -> None:
    relaxed = {**FOLD, "relax": {"rank": 2}}
    small = small_fold(make_source("llama", **SIZES), tmp_path, "int8", recipe=relaxed)
    export(small, tmp_path / "dense", quantise="int8")
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "28 linears as integers, 0 of them as the model stores them" in card
    config = json.loads((tmp_path / "dense" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantise": "int5"}, r"export: quantise: must be one of int8, int4"),
        (
            {"quantise": "int4", "keep": {"q_proj": "int3g64"}},
            r"keep.q_proj: must be one of int8, int4, .* \(got 'int3g64'\)",
        ),
        ({"quantise": "int4", "keep": {"q_prj": "int8"}}, r"keep.q_prj: a linear or a pattern of linears is required"),
        ({"quantise": "int4", "keep": {"q_proj": "q8_0"}}, r"keep.q_proj: must be one of int8, int4"),
        ({"quantise": "int4", "keep": {"head": "int8"}}, r"keep.head: float is required by compressed-tensors"),
        (
            {"quantise": "int4"},
            r"down_proj.weight: inputs in multiples of 32 are required by int4 .*--keep down_proj=int8",
        ),
    ],
)
def test_wishes_that_the_format_has_no_place_for_are_named(
    make_source: Callable[..., Path], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export(make_source("llama"), tmp_path / "dense", **options)
    assert not (tmp_path / "dense").exists()
