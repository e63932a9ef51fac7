"""Contract of the folders `nanbeige` and `nemotron-nas`: mlx-lm, and a reading of their own formats in float64."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from refold.conversion.convert import ConvertOptions, convert
from refold.errors import ExportError
from refold.exporting.export import export
from refold.exporting.targets.nemotron_nas import find_multiplier
from refold.modeling.load import load_model

WIDE = {"intermediate_size": 256, "hidden_act": "silu"}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "strict": ("nanbeige", "llama", {"fold": {"loops": 2}}, {}),
    "strict-uneven": ("nanbeige", "llama", {"fold": {"loops": 3, "uneven": "drop"}}, {}),
    "strict-4-tied": ("nanbeige", "llama", {"fold": {"loops": 4}}, {"tie_word_embeddings": True}),
    "strict-head-dim": ("nanbeige", "llama-linear", {"fold": {"loops": 2}}, {}),
    "factored": ("nanbeige", "llama", {"fold": {"loops": 2}, "factor": {"parameters": 0.5, "weight": "none"}}, {}),
    "dropped": ("nemotron-nas", "llama", {"drop": {"attention": {"layers": [0, 2]}, "mlp": {"layers": [1]}}}, WIDE),
    "dropped-both": (
        "nemotron-nas",
        "llama",
        {"drop": {"attention": {"layers": [1]}, "mlp": {"layers": [1, 3]}}},
        WIDE,
    ),
    "own-widths": (
        "nemotron-nas",
        "llama",
        {"width": {"mlp": [512, 256, 512, 256], "weight": "none"}},
        {**WIDE, "intermediate_size": 512},
    ),
    "dropped-llama3": ("nemotron-nas", "llama-llama3", {"drop": {"attention": {"layers": [3]}}}, WIDE),
}


@pytest.fixture(scope="module")
def make_exported(make_named, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Makes a folded model and its export."""
    folder = tmp_path_factory.mktemp("exported")

    def make(name: str) -> tuple[Path, Path]:
        target, variant, recipe, fields = CASES[name]
        folded, out = folder / f"{name}-folded", folder / name
        if not out.exists():
            convert(make_named(variant, **fields), folded, recipe, options=ConvertOptions(allow_larger=True))
            export(folded, out, target)
        return folded, out

    return make


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _frequencies(config: dict[str, Any], size: int) -> Tensor:
    found = config["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    scaling = config["rope_scaling"]
    if scaling is None:
        return found
    if scaling["rope_type"] == "linear":
        return found / scaling["factor"]
    turns = scaling["original_max_position_embeddings"] * found / (2 * torch.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return found * (smooth + (1 - smooth) / scaling["factor"])


def _rotate(x: Tensor, frequencies: Tensor) -> Tensor:
    angles = torch.arange(len(x), dtype=torch.float64)[:, None, None] * frequencies
    first, second = x.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def _read(folder: Path, tokens: list[int], **changes: Any) -> Tensor:
    """Returns the logits behind the last token, computed in float64 from the folder alone."""
    config = json.loads((folder / "config.json").read_text()) | changes
    weights: dict[str, Any] = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    eps, size = config["rms_norm_eps"], config["head_dim"]
    frequencies = _frequencies(config, size)
    mask = torch.full((len(tokens), len(tokens)), -torch.inf, dtype=torch.float64).triu(1)
    x = weights["model.embed_tokens.weight"][tokens]
    loops = config.get("num_loops", 1)
    for loop in range(loops):
        for index in range(config["num_hidden_layers"]):
            layer: dict[str, Any] = {name: weights.get(f"model.layers.{index}.{name}.weight") for name in NAMES}
            if layer["self_attn.q_proj"] is not None:
                y = _norm(x, layer["input_layernorm"], eps)
                q, k, v = (
                    (y @ layer[f"self_attn.{each}_proj"].T).unflatten(-1, (-1, size)) for each in ("q", "k", "v")
                )
                times = q.shape[1] // k.shape[1]
                q, k = _rotate(q, frequencies), _rotate(k, frequencies)
                k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
                scores = torch.einsum("thd,shd->hts", q, k) * size**-0.5 + mask
                mixed = torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1)
                x = x + mixed @ layer["self_attn.o_proj"].T
            if layer["mlp.up_proj"] is not None:
                y = _norm(x, layer["post_attention_layernorm"], eps)
                gated = torch.nn.functional.silu(y @ layer["mlp.gate_proj"].T) * (y @ layer["mlp.up_proj"].T)
                x = x + gated @ layer["mlp.down_proj"].T
        if loop < loops - 1 and not config["skip_loop_final_norm"]:
            x = _norm(x, weights["model.norm.weight"], eps)
    head = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return (_norm(x, weights["model.norm.weight"], eps) @ head.T)[-1]


NAMES = (
    "input_layernorm",
    "post_attention_layernorm",
    *(f"self_attn.{each}_proj" for each in "qkvo"),
    *(f"mlp.{each}_proj" for each in ("gate", "up", "down")),
)
PROMPT = [5, 9, 40, 60, 61, 62, 70, 71, 3]


@torch.no_grad()
def _distance(folded: Path, logits: Tensor) -> float:
    wanted = load_model(folded, device="cpu").double()(torch.tensor([PROMPT])).logits[0, -1]
    return float((wanted - logits).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_the_folder_alone_says_what_the_model_computes(name: str, make_exported):
    folded, out = make_exported(name)
    # The weights of products and low-rank factors are rounded to float32.
    assert _distance(folded, _read(out, PROMPT)) < 1e-5


def test_control_with_a_norm_between_loops_or_one_loop_the_logits_differ(make_exported):
    folded, out = make_exported("strict")
    assert _distance(folded, _read(out, PROMPT, skip_loop_final_norm=False)) > 1e-2
    assert _distance(folded, _read(out, PROMPT, num_loops=1)) > 1e-2


def test_mlx_lm_computes_what_the_model_computes(make_exported, mlx, make_job, gap):
    made = {name: make_exported(name) for name in CASES}
    for (folded, _), answer in zip(made.values(), mlx([make_job(out) for _, out in made.values()]), strict=True):
        found = gap(load_model(folded, device="cpu").float(), answer, end=None)
        assert found.logits < 1e-4
        assert found.greedy < 1e-4


def test_each_part_is_stored_once_or_not_at_all(make_exported):
    folded, out = make_exported("strict")
    sizes = [sum(path.stat().st_size for path in each.glob("*.safetensors")) for each in (folded, out)]
    assert sizes[1] < 1.02 * sizes[0]
    _, out = make_exported("dropped")
    config, names = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors").keys()
    assert [block["attention"]["no_op"] for block in config["block_configs"]] == [True, False, True, False]
    assert [block["ffn"]["no_op"] for block in config["block_configs"]] == [False, True, False, False]
    assert not any(name.startswith(("model.layers.0.self_attn", "model.layers.1.mlp")) for name in names)


@pytest.mark.parametrize("width", [256, 512, 1024, 14336, 11008])
@pytest.mark.parametrize("hidden", [32, 192, 576, 4096, 3000])
def test_a_multiplier_gives_the_width_back(width: int, hidden: int):
    multiplier = find_multiplier(width, hidden)
    assert multiplier is not None
    raw = int(2 * multiplier * hidden / 3)
    assert (raw if raw % 256 == 0 else raw + 256 - raw % 256) == width
    assert find_multiplier(width + 1, hidden) is None


@pytest.mark.parametrize(
    ("to", "variant", "recipe", "message"),
    [
        (
            "nanbeige",
            "llama",
            {"fold": {"loops": 2, "prelude": 1, "coda": 1}},
            r"one block of layers .*it would with fold",
        ),
        (
            "nanbeige",
            "llama",
            {"fold": {"loops": 2}, "relax": {"rank": 3}},
            r"LoRAs at depths 0..3.*no relax section",
        ),
        ("nanbeige", "llama", {"drop": {"attention": {"layers": [1]}}}, r"attention and an MLP at every depth"),
        ("nanbeige", "qwen2", {"fold": {"loops": 2}}, r"no mixer.q_proj.bias, as nanbeige has"),
        ("nanbeige", "mistral-window", {"fold": {"loops": 2}}, r"attention without windows"),
        ("nemotron-nas", "llama", {"drop": {"mlp": {"layers": [1]}}}, r"whose width is a multiple of 256 .got 48."),
        ("nemotron-nas", "gemma", {"drop": {"mlp": {"layers": [1]}}}, r"activation silu, as nemotron-nas has"),
    ],
)
def test_a_model_that_the_format_cannot_hold_is_refused(to, variant, recipe, message, make_source, tmp_path):
    fields = {"hidden_act": "silu"} if variant == "mistral-window" else {}
    convert(make_source(variant, **fields), tmp_path / "folded", recipe, options=ConvertOptions(allow_larger=True))
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "folded", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
