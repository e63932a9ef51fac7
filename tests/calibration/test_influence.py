"""Influence equals that of transformers' residual streams, and one layer is in memory at a time."""

import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

from refold.calibration.influence import measure_influence, total_change
from refold.calibration.layers import SourceLayer, SourceLayers

MODULES = {
    "llama": ("model.layers", "self_attn", "mlp"),
    "gemma2": ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
}
"""Where the layers are, and the modules whose outputs are added to the stream."""


def changed(before: Tensor, after: Tensor) -> float:
    return float((1 - cosine_similarity(before.double(), after.double(), dim=-1)).mean())


def observe(model: nn.Module, variant: str, ids: Tensor) -> list[dict[str, Tensor]]:
    """Returns the residual streams before and after each layer, and the updates by attention and MLP."""
    layers, attention, mlp = MODULES[variant]
    seen: list[dict[str, Tensor]] = []

    def keep(index: int, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[index][name] = output[0] if isinstance(output, tuple) else output

        return hook

    def before(index: int) -> Any:
        return lambda module, inputs: seen[index].update(before=inputs[0])

    for index, layer in enumerate(model.get_submodule(layers)):  # pyright: ignore[reportArgumentType]
        seen.append({})
        layer.register_forward_pre_hook(before(index))
        layer.register_forward_hook(keep(index, "after"))
        layer.get_submodule(attention).register_forward_hook(keep(index, "attention"))
        layer.get_submodule(mlp).register_forward_hook(keep(index, "mlp"))
    model(ids)
    return seen


@pytest.mark.parametrize("variant", MODULES)
@torch.no_grad()
def test_influence_is_that_of_transformers_streams(make_source, open_source, rows, variant: str) -> None:
    folder = make_source(variant)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    streams = observe(model, variant, rows.input_ids)
    found = measure_influence(open_source(folder).layers, rows)
    for layer, seen in enumerate(streams):
        between = seen["before"] if variant == "gpt_neox" else seen["before"] + seen["attention"]
        assert found.block[layer] == pytest.approx(changed(seen["before"], seen["after"]), abs=1e-5)
        assert found.attention[layer] == pytest.approx(
            changed(seen["before"], seen["before"] + seen["attention"]), abs=1e-5
        )
        assert found.mlp[layer] == pytest.approx(changed(between, between + seen["mlp"]), abs=1e-5)
    # A control: no two figures are alike, so that none can stand in another's place.
    figures = sorted((*found.block, *found.attention, *found.mlp))
    assert min(b - a for a, b in itertools.pairwise(figures)) > 1e-5


@torch.no_grad()
def test_hidden_states_of_transformers_give_the_same_blocks(make_source, open_source, rows) -> None:
    folder = make_source("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    states = model(rows.input_ids, output_hidden_states=True).hidden_states
    found = measure_influence(open_source(folder).layers, rows)
    # The last of them has been through the final norm.
    for layer in range(3):
        assert found.block[layer] == pytest.approx(changed(states[layer], states[layer + 1]), abs=1e-5)


def test_small_changes_are_not_lost_in_rounding() -> None:
    before = torch.tensor([[1.0, 0.0]])
    assert total_change(before, torch.tensor([[1.0, 1e-4]])) == pytest.approx(0.5e-8, rel=1e-3)
    assert total_change(before, 3 * before) == 0.0
    assert total_change(before, -before) == pytest.approx(2.0)


def test_one_layer_is_in_memory_at_a_time(make_source, open_source, rows, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    load = SourceLayers.load

    def counted(self: SourceLayers, index: int) -> SourceLayer:
        nonlocal most
        most = max(most, sum(each() is not None for each in alive))
        layer = load(self, index)
        alive.append(weakref.ref(next(layer._model.mlps.parameters())))
        return layer

    monkeypatch.setattr(SourceLayers, "load", counted)
    told: list[tuple[int, ...]] = []
    done: list[int] = []
    layers = open_source(make_source("llama")).layers
    measure_influence(
        layers, rows, watch_stream=lambda layer, stream: told.append((layer, *stream.shape)), progress=done.append
    )
    assert most == 0, "a layer was loaded while another was still held"
    assert told == [(layer, 3, 24, 32) for layer in range(5)]
    assert done == [1, 2, 3, 4]
