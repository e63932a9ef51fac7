"""Damaged `config.json` files give a plan or one line with the reason, no other error and no hang."""

import copy
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from refold.checkpoint.folded_tensors import check_folded_tensors, read_blueprint
from refold.checkpoint.locate import locate
from refold.conversion.convert import ConvertOptions, convert
from refold.errors import RefoldError
from refold.families.reading import FIELDS, ROPE_FIELDS
from refold.planning.plan import plan

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
ROPE = {"rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PER_LAYER = {"full_attention": ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 10.0}}
BASES: list[dict[str, Any]] = [
    {"model_type": "llama", **SIZES, "rope_parameters": ROPE},
    {"model_type": "llama", **SIZES, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
    {"model_type": "mistral", **SIZES, "sliding_window": 8},
    {"model_type": "gpt_neox", **SIZES, "rotary_pct": 0.25, "layer_norm_eps": 1e-5, "use_parallel_residual": True},
    {"model_type": "qwen2", **SIZES, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    {"model_type": "qwen3", **SIZES, "head_dim": 16, "attention_bias": True},
    {"model_type": "gemma", **SIZES, "head_dim": 16},
    {"model_type": "gemma2", **SIZES, "sliding_window": 8, "query_pre_attn_scalar": 3, "attn_logit_softcapping": 2.0},
    {"model_type": "gemma3_text", **SIZES, "sliding_window": 8, "rope_parameters": PER_LAYER},
    {"model_type": "gemma3", "text_config": {**SIZES, "sliding_window": 8}},
    {"model_type": "olmo2", **SIZES},
    {"model_type": "phi3", **SIZES, "partial_rotary_factor": 0.5},
]
EVIL: list[Any] = [
    *(None, True, False, "", "x", "1e4x", "linear", "awq", "0", [], ["llama"], [[]], {}, {"a": 1}, {"factor": []}),
    *(-1, 0, 1, 2, 3, 7, 10_000, 2**31, 2**63, 10**400, -(10**400), 0.0, -0.5, 1e-300, 1e300, 0.1),
    *(float("nan"), float("inf"), -float("inf"), "\ud800", "ü" * 3000, [None] * 4, ["full_attention"] * 4, [10] * 5000),
    *({"quant_method": "awq"}, {"quant_method": {}}, {"rope_type": ["yarn"]}, {"rope_type": "yarn", "factor": 0}),
]
KEYS = [*FIELDS, *ROPE_FIELDS, "model_type", "quantization_config", "dtype", "torch_dtype", "architectures"]
RECIPES = [None, {"fold": {"loops": 2, "uneven": "prelude"}}, {"fold": {"loops": 2}, "relax": {"rank": 4}}, "pruned"]
MAX_SECONDS = 20


def damaged(base: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    config = copy.deepcopy(base)
    for _ in range(rng.randint(1, 3)):
        objects = [config, *(value for value in config.values() if isinstance(value, dict))]
        objects += [value for each in objects[1:] for value in each.values() if isinstance(value, dict)]
        place = rng.choice(objects)
        key = rng.choice(list(place) or KEYS) if rng.random() < 0.7 else rng.choice(KEYS)
        if rng.random() < 0.1:
            place.pop(key, None)
        else:
            place[key] = copy.deepcopy(rng.choice(EVIL))
    return config


def check_one_line(error: RefoldError) -> None:
    text = str(error)
    assert "\n" not in text, text
    assert len(text) < 2000, text[:300]


def cases(first: int, count: int) -> Iterator[tuple[int, dict[str, Any], random.Random]]:
    for seed in range(first, first + count):
        rng = random.Random(seed)
        yield seed, damaged(rng.choice(BASES), rng), rng


def fuzz_plans(folder: Path, first: int, count: int) -> int:
    """Plans damaged configs and returns how many could be planned."""
    planned = 0
    for seed, config, rng in cases(first, count):
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        begun = time.monotonic()
        try:
            plan(folder, rng.choice(RECIPES), allow_larger=True)
            planned += 1
        except RefoldError as error:
            check_one_line(error)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {config}") from error
        assert time.monotonic() - begun < MAX_SECONDS, (seed, config)
    return planned


def test_a_slice_of_damaged_configs_is_planned_or_refused(tmp_path: Path) -> None:
    planned = fuzz_plans(tmp_path, 0, 80)
    assert 0 < planned < 80


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_damaged_configs_are_planned_or_refused(tmp_path: Path) -> None:
    assert 0 < fuzz_plans(tmp_path, 80, 2000) < 2000


def fuzz_blueprints(folder: Path, first: int, count: int) -> int:
    source = locate(folder)
    headers = source.headers()
    assert headers is not None
    base, accepted = source.read_config(), 0
    for seed in range(first, first + count):
        rng = random.Random(seed)
        config = copy.deepcopy(base)
        place: Any = config["blueprint"]
        while True:
            keys = list(range(len(place))) if isinstance(place, list) else list(place)
            if not keys:
                break
            key = rng.choice(keys)
            if not isinstance(place[key], (dict, list)) or rng.random() < 0.3:
                place[key] = copy.deepcopy(rng.choice(EVIL))
                break
            place = place[key]
        try:
            check_folded_tensors("folder", read_blueprint("folder", config), headers)
            accepted += 1
        except RefoldError as error:
            check_one_line(error)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {config['blueprint']}") from error
    return accepted


def test_a_slice_of_damaged_blueprints_is_read_or_refused(make_source: Any, tmp_path: Path) -> None:
    convert(make_source("llama"), tmp_path / "out", {"fold": {"loops": 2}})
    assert 0 < fuzz_blueprints(tmp_path / "out", 0, 150) < 150


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_damaged_blueprints_are_read_or_refused(make_source: Any, tmp_path: Path) -> None:
    convert(
        make_source("llama"),
        tmp_path / "out",
        {"fold": {"loops": 2}, "relax": {"rank": 2}},
        options=ConvertOptions(allow_larger=True),
    )
    assert 0 < fuzz_blueprints(tmp_path / "out", 150, 2000) < 2000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10_000}, r"`num_hidden_layers` must be .*, at most 1,024 \(got 10000\)"),
        ({"quantization_config": True}, r"plain float weights are required \(got a model quantised by True\)"),
        ({"quantization_config": "awq"}, r"plain float weights are required \(got a model quantised by awq\)"),
        ({"rope_scaling": "linear"}, r"`rope_scaling` must be an object \(got 'linear'\)"),
        ({"rope_scaling": [1]}, r"`rope_scaling` must be an object \(got \[1\]\)"),
        ({"rope_theta": "1e4x"}, r"`rope_theta` must be a number .* \(got '1e4x'\)"),
        ({"model_type": ["llama"]}, r"model_type: must be one of .* \(got \['llama'\]\)"),
        ({"model_type": "gemma3", "text_config": []}, r"`text_config` must be an object \(got \[\]\)"),
        ({"head_dim": 10**400}, r"`head_dim` must be .* \(got a number of 1329 bits\)"),
        ({"hidden_size": 2**40}, r"`hidden_size` must be .*, at most 16,777,216 \(got 1099511627776\)"),
        ({"hidden_size": 1}, r"`hidden_size` must be at least num_attention_heads \(got 1 and 4\)"),
        ({"layer_types": 5, "model_type": "gemma2"}, r"`layer_types` must be a list \(got 5\)"),
    ],
)
def test_known_faults_are_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASES[0], **change}))
    with pytest.raises(RefoldError, match=message):
        plan(tmp_path, {"fold": {"loops": 2}})


def test_a_config_without_an_epsilon_is_planned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASES[0], "rms_norm_eps": 0}))
    assert plan(tmp_path).blueprint.arch.norm.eps == 0
