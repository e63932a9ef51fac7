"""LoRAs of folds load in PEFT beside their unrolled base."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from refold.checkpoint.manifest import verify
from refold.conversion.convert import ConvertOptions, convert
from refold.errors import ExportError
from refold.exporting.export import export
from refold.exporting.registry import find_target
from refold.exporting.target import ExportOptions
from refold.modeling.load import load_model

peft = pytest.importorskip("peft")

FOLD = {"loops": 2, "init": "average"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "relaxed": ("llama", {"fold": FOLD, "relax": {"rank": 3}}),
    "own vectors and gains": ("mistral-window", {"fold": FOLD, "relax": {"rank": 2, "vectors": "own", "gain": "own"}}),
    "ranks by error": ("qwen3", {"fold": FOLD, "relax": {"rank": {"parameters": 0.2}}}),
    "packed by heads": ("gpt_neox", {"fold": FOLD, "relax": {"rank": 3}}),
    "packed by rows": ("phi3", {"fold": FOLD, "relax": {"rank": 3}}),
    "narrow": ("llama", {"width": {"mlp": 0.7, "heads": 0.5, "weight": "none"}, "fold": FOLD, "relax": {"rank": 2}}),
    "dropped": ("llama", {"drop": {"attention": {"layers": [1]}}, "fold": FOLD, "relax": {"rank": 2}}),
    "soft-caps": ("gemma2", {"fold": FOLD, "relax": {"rank": 3}}),
}


@pytest.fixture(scope="module")
def make_folder(make_source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        variant, recipe = CASES[name]
        out = tmp_path_factory.mktemp("folded") / "folded"
        convert(make_source(variant), out, recipe, options=ConvertOptions(allow_larger=True))
        return out

    return make


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 95, (2, 24), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(folder: Path, tokens: Tensor, adapter: Path | None = None) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    return model(tokens).logits


def exchange(adapter: Path, out: Path) -> Path:
    """Copies an adapter whose first and third layers are exchanged."""
    out.mkdir()
    (out / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    held = load_file(adapter / "adapter_model.safetensors")
    turned = {}
    for name, tensor in held.items():
        other = (
            name.replace("layers.0.", "layers.X.").replace("layers.2.", "layers.0.").replace("layers.X.", "layers.2.")
        )
        turned[name] = held.get(other, tensor).clone()
    save_file(turned, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("name", CASES)
def test_base_and_adapter_give_the_logits_of_the_fold(
    make_folder: Callable[[str], Path], tokens: Tensor, tmp_path: Path, name: str
) -> None:
    folder = make_folder(name)
    with torch.no_grad():
        expected = load_model(folder, device="cpu", attn_implementation="eager")(tokens).logits
    out = export(folder, tmp_path / "out", "peft")
    assert verify(out) == ()
    found = logits(out, tokens, out / "adapter")
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-4 * scale
    assert (logits(out, tokens) - expected).abs().max() > 1e-3 * scale, "the base alone is another model"
    files = [*out.glob("*.safetensors"), *out.glob("adapter/*.safetensors")]
    written = sum(4 * tensor.numel() for file in files for tensor in load_file(file).values())
    blueprint = load_model(folder, device="cpu").config.read_blueprint()
    assert find_target("peft").count_bytes(blueprint, ExportOptions(dtype="float32")) == written


def test_exchanged_layers_give_other_logits(make_folder: Callable[[str], Path], tokens: Tensor, tmp_path: Path) -> None:
    out = export(make_folder("relaxed"), tmp_path / "out", "peft")
    right = logits(out, tokens, out / "adapter")
    wrong = logits(out, tokens, exchange(out / "adapter", tmp_path / "exchanged"))
    assert (wrong - right).abs().max() > 1e-3 * right.abs().max()


def test_the_scale_is_one_at_every_rank(make_folder: Callable[[str], Path], tmp_path: Path) -> None:
    out = export(make_folder("ranks by error"), tmp_path / "out", "peft")
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]


def test_models_without_adapters_are_refused(make_source: Callable[..., Path], tmp_path: Path) -> None:
    convert(make_source("llama"), tmp_path / "folded", {"fold": FOLD})
    with pytest.raises(
        ExportError, match=r"peft cannot hold this model: LoRAs at some depth \(there are none\); .*relax"
    ):
        export(tmp_path / "folded", tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()
