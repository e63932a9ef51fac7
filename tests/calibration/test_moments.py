"""Moments read layer by layer, against a plain forward and backward of transformers."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from refold.calibration import moments
from refold.calibration.layers import SourceLayers
from refold.calibration.moments import MomentStore, MomentSums, measure_moments
from refold.checkpoint.reader import CheckpointReader
from refold.data.packing import PackedSequence
from refold.planning.build import identity_blueprint
from refold.planning.factors import stored_linears
from refold.sources.pieces import PieceReader
from refold.sources.source_model import SourceModel, read_source_model

ROWS, TOKENS = 5, 12
VARIANTS = ("llama", "llama-mha-bias", "gpt_neox", "gpt_neox-sequential", "gemma2", "olmo2", "qwen3", "phi3")


def sequences(vocabulary: int) -> PackedSequence:
    ids = torch.randint(vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    places = torch.arange(TOKENS).repeat(ROWS, 1)
    return PackedSequence(input_ids=ids, position_ids=places, labels=ids)


def labels_of(logits: Tensor) -> Tensor:
    """Labels that a chunked and a whole pass agree on: the third likeliest."""
    return logits.topk(3, dim=-1).indices[..., 2]


def measure(folder: Path, scratch: Path, with_gradients: bool) -> tuple[SourceModel, MomentStore]:
    model = read_source_model(folder)
    store = MomentStore(scratch)
    with CheckpointReader(folder) as reader:
        layers = SourceLayers(model, PieceReader(model, reader), rows_at_once=2)
        measure_moments(layers, sequences(model.arch.vocab_size), store, scratch, with_gradients=with_gradients, seed=3)
    return model, store


def plain_moments(folder: Path, vocabulary: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Moments of every linear module, by its name, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            def back(gradient: Tensor) -> None:
                seen[name] = (inputs[0].detach().flatten(0, -2), gradient.flatten(0, -2))

            output.register_hook(back)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            module.register_forward_hook(watch(name))
    logits = model(input_ids=sequences(vocabulary).input_ids).logits
    labels = labels_of(logits)
    nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    tokens = ROWS * TOKENS
    return {name: (x.T @ x / tokens, g.T @ g / tokens) for name, (x, g) in seen.items()}


def owner_of(model: SourceModel, canonical: str, layer: int) -> tuple[str, Tensor | slice]:
    """The transformers module that holds one of our linears, and which of its output rows are ours."""
    piece = next(
        (tensor, tensor.rule.pieces.index(canonical))
        for tensor in model.expected.values()
        if tensor.layer == layer and canonical in tensor.rule.pieces
    )
    tensor, place = piece
    arch, name = model.arch, tensor.name.removesuffix(".weight")
    if len(tensor.rule.pieces) == 1:
        return name, slice(None)
    rows = torch.arange(tensor.shape[0])
    if canonical.startswith("mixer.") and model.family.model_type == "gpt_neox":
        return name, rows.view(arch.num_attention_heads, 3, arch.head_dim)[:, place].flatten()
    query, kv = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
    sizes = (query, kv, kv) if canonical.startswith("mixer.") else (tensor.shape[0] // 2,) * 2
    return name, rows.split(sizes)[place]


@pytest.mark.parametrize("variant", VARIANTS)
def test_moments_are_those_of_one_plain_forward_and_backward(make_source, tmp_path, monkeypatch, variant):
    def pick(chances: Tensor, count: int, generator: torch.Generator) -> Tensor:
        return labels_of(chances.log())[:, None]

    monkeypatch.setattr(moments.torch, "multinomial", pick)
    monkeypatch.setattr(moments, "SAMPLES_AT_ONCE", 7)
    folder = make_source(variant)
    model, store = measure(folder, tmp_path, with_gradients=True)
    expected = plain_moments(folder, model.arch.vocab_size)
    checked = 0
    for pool, layer, linear, (rows, columns) in stored_linears(identity_blueprint(model.arch)):
        found = store.read(layer, linear)
        name, ours = owner_of(model, f"{pool}.{linear}.weight", layer)
        inputs, outputs = expected[name]
        assert found.inputs.shape == (columns, columns)
        assert found.outputs is not None
        assert found.outputs.shape == (rows, rows)
        assert torch.allclose(found.inputs.double(), inputs, rtol=1e-3, atol=1e-4 * float(inputs.diagonal().mean()))
        outputs = outputs[ours][:, ours]
        assert torch.allclose(found.outputs.double(), outputs, rtol=1e-2, atol=1e-3 * float(outputs.diagonal().mean()))
        checked += 1
    assert checked == 4 * (6 + model.arch.gated_mlp)


def test_linears_with_one_input_share_its_moment(make_source, tmp_path):
    model, store = measure(make_source("llama"), tmp_path, with_gradients=False)
    for layer in range(model.arch.num_layers):
        found = {name: store.read(layer, name).inputs for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        assert torch.equal(found["q_proj"], found["k_proj"])
        assert torch.equal(found["q_proj"], found["v_proj"])
        assert not torch.allclose(found["q_proj"], found["o_proj"], rtol=0.1)
        assert torch.equal(store.read(layer, "gate_proj").inputs, store.read(layer, "up_proj").inputs)
        assert not torch.allclose(store.read(layer, "gate_proj").inputs, found["q_proj"], rtol=0.1)
        assert store.read(layer, "q_proj").outputs is None


def test_inputs_are_the_same_with_gradients_and_streams_are_taken_away(make_source, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    model, plain = measure(make_source("llama"), tmp_path / "one", with_gradients=False)
    _, fisher = measure(make_source("llama"), tmp_path / "two", with_gradients=True)
    for layer in range(model.arch.num_layers):
        for name in ("q_proj", "o_proj", "up_proj", "down_proj"):
            assert torch.allclose(plain.read(layer, name).inputs, fisher.read(layer, name).inputs, rtol=1e-4, atol=1e-5)
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == [
        f"layer-{layer:04d}.safetensors" for layer in range(4)
    ]


def test_labels_are_drawn_from_the_models_own_predictions(make_source, tmp_path):
    stores = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        stores.append(measure(make_source("llama"), tmp_path / name, with_gradients=True)[1])
    one, other = (store.read(2, "o_proj").outputs for store in stores)
    assert torch.equal(one, other)


def test_progress_counts_each_layer_forwards_and_backwards(make_source, tmp_path):
    folder = make_source("llama")
    model, seen = read_source_model(folder), []
    with CheckpointReader(folder) as reader:
        layers = SourceLayers(model, PieceReader(model, reader))
        for with_gradients in (False, True):
            measure_moments(
                layers,
                sequences(model.arch.vocab_size),
                MomentStore(tmp_path),
                tmp_path,
                with_gradients=with_gradients,
                progress=seen.append,
            )
    assert seen == [1, 2, 3, 4, *range(1, 9)]


def test_a_layer_that_was_run_back_goes_at_once(make_source) -> None:
    source = make_source("llama")
    model = read_source_model(source)
    with CheckpointReader(source) as reader:
        layers = SourceLayers(model, PieceReader(model, reader), rows_at_once=2)
        packed = sequences(model.arch.vocab_size)
        hidden = layers.embed(packed.input_ids)
        layer, sums = layers.load(0), MomentSums()
        gone = [weakref.ref(each) for each in (layer, sums)]
        gc.disable()
        try:
            layer.run_back(hidden, packed.position_ids, hidden, sums.see_input, sums.see_gradient)
            del layer, sums
            assert [each() for each in gone] == [None, None]
        finally:
            gc.enable()
