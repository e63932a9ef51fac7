"""Models packed for inference give the results of the models they were made of."""

from typing import Any

import pytest
import torch
from torch import Tensor

from refold.blueprint.integers import find_scheme
from refold.errors import RefoldError
from refold.modeling.packed_weights import PackSettings, pack_model
from refold.modeling.quantise import quantise_linears
from refold.modeling.rows import RowRange
from refold.nn.products import FORMATS

FOLD = {"loops": 2, "init": "average"}
FOLDED = {"fold": FOLD, "relax": {"rank": 3, "vectors": "own"}}
BASIS = {"parameters": 0.6, "share": "basis", "weight": "none"}
RECIPES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "identity": ("llama", None),
    "biases": ("qwen2", None),
    "head norms": ("qwen3", None),
    "full norms": ("olmo2-bias", None),
    "layer norms": ("gpt_neox", None),
    "offset norms": ("gemma2", None),
    "strict": ("llama", {"fold": FOLD}),
    "relaxed": ("qwen2", {"fold": FOLD, "relax": {"rank": 3, "vectors": "tied"}}),
    "own vectors": ("qwen2", FOLDED),
    "own layer norms": ("gpt_neox", FOLDED),
    "gains": ("llama", {"fold": FOLD, "relax": {"rank": 3, "vectors": "own", "gain": "own"}}),
    "basis": ("llama", {"fold": FOLD, "factor": BASIS}),
    "relaxed basis": ("qwen2", {"fold": {"loops": 2}, "relax": {"rank": 3, "init": "joint"}, "factor": BASIS}),
    "low rank": ("qwen2", {"factor": {"parameters": 0.6, "weight": "none"}}),
    "prefix": ("llama", {"fold": FOLD, "relax": {"type": "prefix", "length": 3}, "exits": {"at": "loops"}}),
    "shared keys": ("llama", {"fold": FOLD, "share_kv": {"from": "first_loop"}}),
    "shared heads": ("llama", {"share_kv": {"from": {"back": 1}, "heads": [1]}}),
    "exits": ("llama", {"fold": FOLD, "exits": {"at": "loops", "norm": "own", "head_rank": 2}}),
    **{
        f"{name} {kind}": ("llama", {"mixers": [mixer], **sections})
        for name, mixer in {
            "mamba": {"type": "mamba", "transfer": ["mlp"]},
            "mamba2": {"type": "mamba2", "q_heads": 2, "k_heads": 2, "key_dim": 6},
            "gla": {"type": "gla", "transfer": "all"},
            "gated_deltanet": {"type": "gated_deltanet", "transfer": "all"},
            "retention": {
                "type": "retention",
                "decay": "slopes",
                "activation": "silu",
                "norm": "full",
                "gate": "sigmoid",
            },
            "linear_attention": {"type": "linear_attention", "window": 5},
        }.items()
        for kind, sections in {"alone": {}, "relaxed": FOLDED}.items()
    },
}
WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""Sizes that the kernels of integers take."""
FACTORED = ("basis", "relaxed basis", "low rank")
"""Recipes whose ranks those kernels refuse."""
ADAPTED = ("relaxed", "own vectors", "gains", "relaxed basis")


def far(one: Tensor, other: Tensor) -> float:
    """Largest difference, beside the largest number."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


def error(one: Tensor, other: Tensor) -> float:
    """Root of the mean squared difference, beside that of the other."""
    return float((one.float() - other.float()).norm() / other.float().norm())


@pytest.fixture
def load_any(load):
    """Loads a converted model whose adapters and vectors all count."""

    def make(name: str, **fields: Any) -> Any:
        model, generator = load(*RECIPES[name], **fields), torch.Generator().manual_seed(5)
        for key, weight in model.named_parameters():
            if any(kind in key for kind in (".lora.", ".vectors.", ".gain.", "_norm", "bias", ".prefix")):
                weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
        return model

    return make


@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_a_model_packed_in_float32_is_the_model(load_any, tokens, name):
    model = load_any(name)
    expected = model(tokens, use_cache=True)
    after = model(tokens[:, :1], past_key_values=expected.past_key_values).logits
    pack_model(model, PackSettings("float32"))
    found = model(tokens, use_cache=True)
    assert far(found.logits, expected.logits) < 2e-5
    assert far(model(tokens[:, :1], past_key_values=found.past_key_values).logits, after) < 2e-5


@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_a_model_packed_in_bfloat16_is_the_model_in_bfloat16(load_any, tokens, name):
    exact, rounded, model = (load_any(name) for _ in range(3))
    rounded.bfloat16()
    pack_model(model, PackSettings("bfloat16"))
    assert model.dtype == torch.bfloat16
    expected = exact(tokens).logits
    # Another order of roundings is allowed, coarser ones are not.
    assert error(model(tokens).logits, expected) < 1.3 * error(rounded(tokens).logits, expected)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in FACTORED])
@torch.no_grad()
def test_a_model_packed_in_integers_is_the_quantised_model(load_any, tokens, name, format):
    exact, quantised, model = (load_any(name, **WIDE) for _ in range(3))
    quantise_linears(quantised, find_scheme(format))
    expected = quantised(tokens).logits
    pack_model(model, PackSettings(format, adapters="bfloat16"))
    found = model(tokens).logits
    assert error(found, expected) < 2 * error(quantised.bfloat16()(tokens).logits, expected)
    if format == "int4":
        assert error(found, expected) < 0.5 * error(found, exact(tokens).logits)


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
@torch.no_grad()
def test_rows_at_several_depths_are_each_alone(load_any, name, format):
    model = load_any(name)
    pack_model(model, PackSettings(format))
    streams = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(3)).to(model.dtype)
    stack = model.model
    batch = stack.batch(streams)
    rows = [RowRange(range(2), 2), RowRange(range(2, 4), 3)]
    tolerance = 2e-5 if format == "float32" else 2e-2
    for _ in range(2):
        found = stack.run_rows(rows, streams, batch)
        first = stack.run(range(2), streams[:2], batch).hidden_states
        second = stack.run(range(2, 4), streams[2:], batch).hidden_states
        assert far(found[:2], first) < tolerance
        assert far(found[2:], second) < tolerance


@torch.no_grad()
def test_control_with_the_adapters_of_another_loop_rows_differ(load_any):
    model = load_any("own vectors")
    pack_model(model, PackSettings("float32"))
    streams = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(3))
    stack = model.model
    batch = stack.batch(streams)
    alone = stack.run(range(2), streams[:2], batch).hidden_states
    one, other = stack.depths[0], stack.depths[2]
    one.packed = one.packed._replace(adapters=other.packed.adapters)
    found = stack.run_rows([RowRange(range(2), 2), RowRange(range(2, 4), 3)], streams, batch)
    assert far(found[:2], alone) > 1e-2


@torch.no_grad()
def test_each_row_of_a_packed_model_leaves_at_its_own_exit(load_any, tokens):
    model = load_any("exits")
    depths = torch.tensor([2, 4])
    expected = model(tokens, exit_depth=depths).logits
    pack_model(model)
    assert far(model(tokens, exit_depth=depths).logits, expected) < 2e-5


def test_a_packed_model_neither_trains_nor_saves_nor_packs_again(load_any, tmp_path):
    model = load_any("relaxed")
    packed = pack_model(model)
    assert packed.total > 0
    with pytest.raises(RefoldError, match="train: a model with its weights is required"):
        model.train()
    with pytest.raises(RefoldError, match="save: a model with its weights is required"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(RefoldError, match="pack: a model that is not packed is required"):
        pack_model(model)
    assert not any(each.requires_grad for each in model.parameters())


def test_only_folded_models_are_packed(load_source):
    with pytest.raises(RefoldError, match="pack: a folded model is required"):
        pack_model(load_source("llama"))


def test_a_format_that_there_is_not_is_refused():
    with pytest.raises(RefoldError, match=r"weights: .*int4"):
        PackSettings("int5")


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_are_those_of_the_format(load, format):
    model = load("llama", None, **WIDE)
    parts = (*model.model.mixers, *model.model.mlps)
    shapes = [each.shape for part in parts for each in part.parameters() if each.ndim == 2]
    packed = pack_model(model, PackSettings(format))
    numbers, rows = sum(shape.numel() for shape in shapes), sum(shape[0] for shape in shapes)
    # Scales in bfloat16: one for each output, or one and a zero for each group of 32.
    expected = {"float32": 4 * numbers, "bfloat16": 2 * numbers, "int8": numbers + 2 * rows, "int4": numbers * 5 / 8}
    expected["int4z"] = expected["int4"]
    assert packed.stack == expected[format]
    assert packed.total == packed.stack + packed.head + packed.embedding + packed.others
