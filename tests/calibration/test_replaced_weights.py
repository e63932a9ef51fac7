"""Maps in place of dropped parts equal float64 loops over transformers' updates, and go into the right tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from refold.blueprint.origins import Replacement
from refold.calibration.moments import MomentStore, Shrinkage
from refold.calibration.narrowed import NarrowedMoments
from refold.calibration.replaced_weights import (
    MapPlan,
    MeasuredMap,
    ReplacedMoments,
    ReplacedPieces,
    measure_replacements,
)
from refold.calibration.replacement import RIDGES, halve
from refold.data.packing import PackedSequence
from refold.errors import SourceError

LLAMA = ("model.layers", "self_attn", "mlp")
CASES: dict[str, tuple[Replacement, tuple[str, str, str]]] = {
    "llama": (
        Replacement(pool="mlp", layer=1, gone=((2, "mixer"), (2, "mlp"), (3, "mixer")), into="down_proj"),
        LLAMA,
    ),
    "llama-mha-bias": (Replacement(pool="mixer", layer=2, gone=((2, "mlp"),), into="o_proj"), LLAMA),
    "gemma2": (
        Replacement(pool="mlp", layer=0, gone=((1, "mixer"), (1, "mlp")), into="output_norm"),
        ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "gpt_neox": (
        Replacement(pool="mlp", layer=2, gone=((2, "mixer"),), into="down_proj"),
        ("gpt_neox.layers", "attention", "mlp"),
    ),
}
"""For each variant the replacement, and transformers' names of the layers and of the modules that add to the stream."""


@pytest.fixture
def many_rows() -> PackedSequence:
    """Rows of few different tokens, so that updates of different parts have something in common."""
    ids = torch.randint(2, 12, (31, 16), generator=torch.Generator().manual_seed(5))
    return PackedSequence(ids, torch.arange(16).expand(31, -1), ids)


def observe(
    folder: Path, names: tuple[str, str, str], ids: Tensor, change: Callable[[nn.Module], None] = lambda model: None
) -> dict[Any, np.ndarray]:
    """Returns the update of each part by layer and pool, and the stream behind each layer by the layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    change(model)
    seen: dict[Any, np.ndarray] = {}

    def keep(key: Any) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[key] = (output[0] if isinstance(output, tuple) else output).double().numpy()

        return hook

    for index, layer in enumerate(model.get_submodule(names[0])):  # pyright: ignore[reportArgumentType]
        layer.register_forward_hook(keep(index))
        for pool, name in zip(("mixer", "mlp"), names[1:], strict=True):
            layer.get_submodule(name).register_forward_hook(keep((index, pool)))
    with torch.no_grad():
        model(ids)
    return seen


def solve(m: np.ndarray, d: np.ndarray, weights: np.ndarray, ridge: float, is_diagonal: bool) -> np.ndarray:
    """Returns T - I by sums over tokens, one after the other."""
    size = m.shape[1]
    inputs, crossed = np.zeros((size, size)), np.zeros((size, size))
    for token in range(len(m)):
        inputs += weights[token] * np.outer(m[token], m[token])
        crossed += weights[token] * np.outer(d[token], m[token])
    if is_diagonal:
        return np.diag(np.diag(crossed) / (np.diag(inputs) + ridge * np.diag(inputs).mean()))
    return crossed @ np.linalg.inv(inputs + ridge * np.trace(inputs) / size * np.eye(size))


def expected_map(
    seen: dict[Any, np.ndarray], replacement: Replacement, weights: np.ndarray
) -> tuple[np.ndarray, float]:
    """Returns T and the share of energy that it keeps, checked on halves."""
    m = seen[replacement.layer, replacement.pool]
    d = np.sum([seen[place] for place in replacement.gone], axis=0)
    rows, tokens, size = m.shape
    half = halve(torch.arange(rows).repeat_interleave(tokens)).numpy()
    m, d, weights = m.reshape(-1, size), d.reshape(-1, size), weights.reshape(-1)
    energy, best = float((weights[:, None] * d**2).sum()), (0.0, 0.0)
    for ridge in RIDGES:
        error = 0.0
        for fit in range(2):
            ours, theirs = half == fit, half != fit
            change = solve(m[ours], d[ours], weights[ours], ridge, replacement.is_diagonal)
            error += float((weights[theirs, None] * (d[theirs] - m[theirs] @ change.T) ** 2).sum())
        best = max(best, (1 - error / energy, ridge))
    kept, ridge = best
    assert ridge, "the updates of this test must have something in common"
    return np.eye(size) + solve(m, d, weights, ridge, replacement.is_diagonal), kept


@pytest.mark.parametrize("variant", CASES)
def test_maps_are_those_of_loops_over_transformers_updates(
    make_source, open_source, many_rows, tmp_path, variant
) -> None:
    replacement, names = CASES[variant]
    folder = make_source(variant, **({"attention_bias": True} if variant == "gpt_neox" else {}))
    opened = open_source(folder)
    seen = observe(folder, names, many_rows.input_ids)
    layer, pool = replacement.gone[-1]
    # The stream behind the last dropped part: attention's is the layer's without the MLP's update.
    after = seen[layer] if pool == "mlp" or variant == "gpt_neox" else seen[layer] - seen[layer, "mlp"]
    weights = 1 / (np.mean(after**2, axis=-1) + 1e-6)
    matrix, kept = expected_map(seen, replacement, weights)
    plan = MapPlan([replacement], replacement.gone)
    (found,) = measure_replacements(opened.layers, many_rows, plan, tmp_path)
    ours = found.read().double().numpy()
    assert np.allclose(np.diag(ours) if replacement.is_diagonal else ours, matrix, atol=2e-3 * np.abs(matrix).max())
    assert found.kept == pytest.approx(kept, abs=1e-3)
    assert found.describe() == (
        f"drop: a linear map restores {found.kept:.1%} of the energy lost with {replacement.describe()}"
    )
    # A control: other weights of tokens give another map.
    other, _ = expected_map(seen, replacement, weights**2)
    assert not np.allclose(other, matrix, atol=2e-3 * np.abs(matrix).max())
    _check_pieces(opened, found)


@torch.no_grad()
@pytest.mark.parametrize("is_alone", [False, True])
def test_later_maps_correct_the_errors_that_earlier_drops_left(make_source, open_source, many_rows, tmp_path, is_alone):
    first = Replacement(pool="mlp", layer=0, gone=((1, "mixer"),), into="down_proj")
    second = Replacement(pool="mlp", layer=1, gone=((2, "mixer"),), into="down_proj")
    folder = make_source("llama")
    plan = MapPlan([first, second], [*first.gone, *second.gone], is_alone)
    maps = measure_replacements(open_source(folder).layers, many_rows, plan, tmp_path)
    source = observe(folder, LLAMA, many_rows.input_ids)
    wanted = source[1] + source[2, "mixer"]

    def change(model: nn.Module) -> None:
        layers = model.get_submodule("model.layers")
        projection = layers[0].mlp.down_proj  # pyright: ignore[reportIndexIssue]
        projection.weight.copy_(maps[0].read() @ projection.weight)
        layers[1].self_attn.register_forward_hook(silence)  # pyright: ignore[reportIndexIssue]

    folded = source if is_alone else observe(folder, LLAMA, many_rows.input_ids, change)
    seen = {(1, "mlp"): folded[1, "mlp"], (2, "mixer"): wanted - folded[1]}
    matrix, kept = expected_map(seen, second, 1 / (np.mean(wanted**2, axis=-1) + 1e-6))
    assert np.allclose(maps[1].read().numpy(), matrix, atol=2e-3 * np.abs(matrix).max())
    assert maps[1].kept == pytest.approx(kept, abs=1e-3)
    assert (np.abs(folded[1] - source[1]).max() > 0.1) is not is_alone


def silence(module: nn.Module, inputs: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:])


def _check_pieces(opened: Any, found: MeasuredMap) -> None:
    """Checks that only the projection, its bias or the norm is changed, so that the update is T times the old one."""
    pieces, replacement = ReplacedPieces(opened.pieces, [found]), found.replacement
    read = opened.pieces.read
    matrix = found.read()
    name = f"{replacement.pool}.{replacement.into}"
    for layer in range(4):
        for canonical in (
            f"{name}.weight",
            f"{name}.bias",
            f"{replacement.pool}.up_proj.weight",
            "mixer.q_proj.weight",
        ):
            try:
                source = read(canonical, layer, torch.float32)
            except (KeyError, SourceError):
                continue
            changed = pieces.read(canonical, layer, torch.float32)
            if layer != replacement.layer or name not in canonical:
                assert torch.equal(changed, source)
            elif replacement.is_diagonal:
                assert torch.allclose(1 + changed, matrix * (1 + source), atol=1e-5)
            else:
                assert torch.allclose(changed, matrix @ source, atol=1e-5)
                assert not torch.allclose(changed, source, atol=1e-3)


def test_gradients_of_a_replaced_output_are_those_behind_the_run(tmp_path) -> None:
    store = MomentStore(tmp_path)
    for layer in range(4):
        names = {"down_proj": torch.eye(2) * (10 + layer), "o_proj": torch.eye(2) * (20 + layer)}
        outputs = {name: 100 * value for name, value in names.items()}
        store.write(layer, names, {name: name for name in names}, outputs)
    maps = [
        MeasuredMap(Replacement(pool="mlp", layer=0, gone=((1, "mixer"), (1, "mlp")), into="down_proj"), 0.5, tmp_path),
        MeasuredMap(Replacement(pool="mixer", layer=2, gone=((2, "mlp"), (3, "mixer")), into="o_proj"), 0.5, tmp_path),
    ]
    found = ReplacedMoments(store, maps)

    def first(layer: int, linear: str) -> tuple[float, float]:
        moments = found.read(layer, linear)
        assert moments.outputs is not None
        return float(moments.inputs[0, 0]), float(moments.outputs[0, 0])

    assert first(0, "down_proj") == (10, 1100)
    assert first(2, "o_proj") == (22, 2300)
    assert first(0, "o_proj") == (20, 2000)
    assert first(3, "down_proj") == (13, 1300)


def test_moments_of_a_replaced_source_shrink_by_the_strengths_of_its_own(make_arch, tmp_path) -> None:
    store = MomentStore(tmp_path, Shrinkage(0.3))
    store.write(0, {"o_proj": torch.diag(torch.tensor([1.0, 3.0]))}, {"o_proj": "o_proj"}, None)
    for found in (ReplacedMoments(store, []), NarrowedMoments(store, make_arch(1), {})):
        assert found.shrinkage == store.shrinkage
        assert torch.allclose(found.read(0, "o_proj").inputs.diagonal(), torch.tensor([1.3, 2.7]))
