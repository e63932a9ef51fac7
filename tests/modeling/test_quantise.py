"""Rounding the weights of linears."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from refold.blueprint.integers import SCHEMES, Scheme
from refold.blueprint.quantisation import quantised_bytes
from refold.checkpoint.locate import locate
from refold.conversion.convert import ConvertOptions, carry_out, convert
from refold.modeling.load import load_model
from refold.modeling.quantise import quantise_linears, round_to_nearest
from refold.planning.allocation import with_ranks
from refold.planning.plan import plan, replan
from refold.sources.source_model import read_source_model

INT8, INT4, INT4Z = SCHEMES["int8"], SCHEMES["int4"], SCHEMES["int4z"]


def draw(rows: int, columns: int, mean: float = 0.0) -> torch.Tensor:
    return mean + torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("scheme", "columns"), [(INT8, 70), (INT4, 64), (INT4, 70), (INT4Z, 64), (INT4Z, 7)], ids=str)
def test_every_weight_moves_to_the_nearest_of_its_groups_numbers(scheme: Scheme, columns: int) -> None:
    weight = draw(5, columns)
    rounded = round_to_nearest(weight, scheme)
    for row, values in zip(weight, rounded, strict=True):
        for begin in range(0, columns, scheme.group or columns):
            group, found = (each[begin : begin + (scheme.group or columns)] for each in (row, values))
            low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
            steps = 127 if scheme.group is None else 8
            step = (high - low) / 15 if scheme.has_zero_point else float(group.abs().max()) / steps
            assert len(found.unique()) <= 2**scheme.bits
            # Half a step; at the ends of the range a little more, since the scale is rounded and the zero point whole.
            # Of 16 integers without a zero point the far end opposite the farthest number is one step nearer.
            assert float((group - found).abs().max()) <= step * (0.8 if scheme.group is None else 1.05)
            assert float((group - found).abs().median()) <= 0.5 * step


def test_zero_stays_zero_and_a_group_of_zeros_too() -> None:
    weight = draw(4, 64, mean=3.0)
    weight[:, ::5] = 0
    weight[2] = 0
    for scheme in SCHEMES.values():
        rounded = round_to_nearest(weight, scheme)
        assert rounded[2].eq(0).all()
        # The four values of two bits lie around zero.
        assert rounded[weight == 0].eq(0).all() == (scheme.middle % 1 == 0)
        assert rounded.isfinite().all()


def test_a_zero_point_follows_weights_that_lie_on_one_side() -> None:
    weight = draw(8, 256).abs()
    symmetric = INT4
    errors = [(round_to_nearest(weight, scheme) - weight).square().mean() for scheme in (INT4Z, symmetric)]
    assert errors[0] < 0.6 * errors[1]


def test_smaller_groups_and_wider_integers_are_nearer() -> None:
    weight = draw(16, 512)
    schemes = [INT8, INT4, INT4.model_copy(update={"group": 128}), INT4.model_copy(update={"group": None})]
    errors = [float((round_to_nearest(weight, scheme) - weight).norm() / weight.norm()) for scheme in schemes]
    assert errors == sorted(errors)
    assert errors[0] < 0.01 < errors[1] < 0.1


@pytest.mark.parametrize(
    ("name", "dtype"), [("int8", torch.float32), ("int4", torch.float32), ("int4", torch.bfloat16)]
)
def test_torchao_rounds_alike(name: str, dtype: torch.dtype) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from torchao.quantization.granularity import PerGroup  # pyright: ignore[reportMissingImports]
    from torchao.quantization.quant_primitives import MappingType  # pyright: ignore[reportMissingImports]

    linear = nn.Linear(256, 64, bias=False, dtype=dtype)
    linear.weight.data.copy_(draw(64, 256, mean=0.2))
    if name == "int8":
        config = quantization.Int8WeightOnlyConfig(version=2)
    else:
        config = quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # pyright: ignore[reportAttributeAccessIssue]
            granularity=PerGroup(32),
            mapping_type=MappingType.ASYMMETRIC,
        )
    ours = round_to_nearest(linear.weight.data, INT8 if name == "int8" else INT4Z)
    before = linear.weight.data.float()
    quantization.quantize_(linear, config)
    theirs: Any = linear.weight
    theirs = theirs.dequantize().detach().float()
    errors = [float((each - before).norm() / before.norm()) for each in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
    assert float((ours - theirs).norm() / before.norm()) < 1.5 * errors[1]  # independent errors: 1.41


def test_linears_of_a_source_are_rounded_once_and_nothing_else(make_source) -> None:
    source = make_source("llama")
    before, model = load_model(source, device="cpu"), load_model(source, device="cpu")
    weights = quantise_linears(model, INT4)
    assert len(weights) == len({id(weight) for weight in weights}) == 4 * 7
    for name, old in before.named_parameters():
        new = model.get_parameter(name)
        if "_proj" in name and name.endswith(".weight"):
            assert new.equal(round_to_nearest(old.data, INT4))
            assert not new.equal(old)
        else:
            assert new.equal(old)


def test_of_a_folded_model_stored_weights_and_factors_are_rounded_and_loras_are_not(
    make_source, tmp_path: Path
) -> None:
    recipe: dict[str, Any] = {
        "fold": {"loops": 2},
        "relax": {"rank": 2, "init": "joint", "vectors": "own"},
        "factor": {"parameters": 0.45, "weight": "none"},
    }
    convert(make_source("llama"), tmp_path / "out", recipe, options=ConvertOptions(allow_larger=True))
    before, model = (load_model(tmp_path / "out", device="cpu") for _ in range(2))
    weights = quantise_linears(model, INT4)
    rounded = [
        name
        for name, old in before.named_parameters()
        if name.startswith(("model.mixers.", "model.mlps.")) and old.dim() == 2
    ]
    assert len(weights) == len(rounded) == 2 * 7 * 2  # two stored layers, seven linears, two factors
    for name, old in before.named_parameters():
        expected = round_to_nearest(old.data, INT4) if name in rounded else old
        assert model.get_parameter(name).equal(expected)
        assert (name in rounded) == (not model.get_parameter(name).equal(old))


def test_what_depths_keep_of_a_linear_is_rounded_where_no_weight_is_stored_for_all(make_source, tmp_path: Path) -> None:
    recipe = {"fold": {"loops": 2}, "relax": {"rank": 3}, "factor": {"parameters": 0.6, "weight": "none"}}
    basis = {**recipe, "factor": {**recipe["factor"], "share": "basis"}}
    source = make_source("llama")
    made = plan(source, recipe, allow_larger=True)
    apart = with_ranks(made.blueprint, {}, {("mlp", 0): {"up_proj": 0}})
    carry_out(replan(made, read_source_model(source), apart), locate(source), tmp_path / "apart")
    convert(source, tmp_path / "basis", basis, options=ConvertOptions(allow_larger=True))
    for name, own in (("apart", r"depths\.[02]\.lora\.up_proj"), ("basis", r"depths\.\d\.coefficients")):
        before, model = (load_model(tmp_path / name, device="cpu") for _ in range(2))
        weights = quantise_linears(model, INT4)
        rounded = {
            each
            for each, old in before.named_parameters()
            if re.match(rf"model\.(mixers|mlps|{own})\.", each) and old.dim() == 2
        }
        assert len(weights) == len(rounded)
        for each, old in before.named_parameters():
            assert model.get_parameter(each).equal(round_to_nearest(old.data, INT4) if each in rounded else old)
        others = sum(old.numel() for each, old in before.named_parameters() if each not in rounded)
        size = sum(INT4.num_bytes(*weight.shape) for weight in weights) + 4 * others
        assert size == quantised_bytes(model.config.read_blueprint(), 4, INT4)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_tied_head_stays_the_embedding(make_source) -> None:
    source = make_source("llama", tie_word_embeddings=True)
    before: Any = load_model(source, device="cpu")
    model: Any = load_model(source, device="cpu")
    quantise_linears(model, INT8)
    for each in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert each.weight.equal(before.get_input_embeddings().weight)
