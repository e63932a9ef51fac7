"""A source that runs layer by layer gives the outputs of transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from refold.calibration.calibration import draw_streams, pack_calibration
from refold.calibration.layers import SourceLayers
from refold.checkpoint.reader import CheckpointReader
from refold.data.mixture import MixedSource
from refold.data.packing import PackedSequence
from refold.data.readers import from_documents
from refold.errors import DataError
from refold.modeling.load import load_tokenizer
from refold.sources.pieces import PieceReader
from refold.sources.source_model import read_source_model


def open_layers(folder: Path, rows_at_once: int = 2) -> SourceLayers:
    model = read_source_model(folder)
    return SourceLayers(model, PieceReader(model, CheckpointReader(folder)), rows_at_once=rows_at_once)


def make_rows(lengths: tuple[int, ...], rows: int = 3) -> PackedSequence:
    """Rows of documents of these lengths."""
    ids = torch.randint(2, 95, (rows, sum(lengths)), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1)
    return PackedSequence(ids, positions, ids)


def load_reference(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize(
    "variant", ["llama", "llama-mha-bias", "llama-llama3", "mistral-window", "gpt_neox", "gpt_neox-sequential"]
)
@torch.no_grad()
def test_streams_and_attention_are_those_of_transformers(make_source: Callable[..., Path], variant: str) -> None:
    folder, rows = make_source(variant), make_rows((24,))
    model = load_reference(folder)
    told = model(rows.input_ids, output_hidden_states=True, output_attentions=True)
    layers = open_layers(folder)
    seen = []
    for layer, streams in layers.walk(rows):
        seen.append(layer.index)
        assert torch.allclose(streams, told.hidden_states[layer.index], atol=2e-4, rtol=1e-4)
        sample = layer.attention(streams, rows.position_ids)
        assert torch.allclose(sample.weights, told.attentions[layer.index], atol=1e-4)
        scores = torch.einsum("bthk,bshk->bhts", sample.query, sample.key)
        scores = scores.masked_fill(told.attentions[layer.index] == 0, -torch.inf)
        assert torch.allclose(scores.softmax(-1), told.attentions[layer.index], atol=1e-4)
    assert seen == [0, 1, 2, 3]


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(make_source: Callable[..., Path]) -> None:
    folder, packed = make_source("llama"), make_rows((10, 14))
    alone = PackedSequence(packed.input_ids[:, 10:], packed.position_ids[:, 10:], packed.labels[:, 10:])
    layers = open_layers(folder)
    for (layer, streams), (_, others) in zip(layers.walk(packed), layers.walk(alone), strict=True):
        assert torch.allclose(streams[:, 10:], others, atol=1e-4)
        sample = layer.attention(streams, packed.position_ids)
        assert float(sample.weights[:, :, 10:, :10].abs().max()) == 0.0
        assert torch.equal(sample.resets.nonzero()[:2], torch.tensor([[0, 0], [0, 10]]))


@torch.no_grad()
def test_inputs_of_every_linear_are_those_of_transformers(make_source: Callable[..., Path]) -> None:
    folder, rows = make_source("llama"), make_rows((12,))
    model = load_reference(folder)
    expected: dict[tuple[int, str], Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        key = int(name.split(".")[2]), name.rpartition(".")[2]
        return lambda module, inputs: expected.update({key: inputs[0]})

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(keep(name))
    model(rows.input_ids)
    found: dict[tuple[int, str], list[Tensor]] = {}
    for _ in open_layers(folder).walk(rows, watch=lambda *at: found.setdefault(at[:2], []).append(at[2])):
        pass
    assert found.keys() == expected.keys()
    assert len(found) == 4 * 7
    for key, parts in found.items():
        assert torch.allclose(torch.cat(parts), expected[key], atol=2e-4, rtol=1e-4), key


def test_rows_at_once_change_nothing(make_source: Callable[..., Path]) -> None:
    rows = make_rows((12,), rows=3)
    one, all_ = ([streams for _, streams in open_layers(make_source("llama"), n).walk(rows)] for n in (1, 3))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, all_, strict=True))


def test_a_layer_without_its_mlp_has_the_same_attention(make_source: Callable[..., Path]) -> None:
    layers = open_layers(make_source("llama"))
    streams = draw_streams(layers.arch, 2, 16, seed=3)
    whole, half = layers.load(1).attention(streams, None), layers.load(1, ("mixer",)).attention(streams, None)
    assert all(torch.equal(a, b) for a, b in zip(whole, half, strict=True))
    assert not torch.equal(whole.weights, layers.load(2).attention(streams, None).weights)


def test_a_source_in_half_precision_is_run_in_float32(make_source: Callable[..., Path]) -> None:
    layers = open_layers(make_source("llama", dtype="bfloat16"))
    streams = [each for _, each in layers.walk(make_rows((8,)), num_layers=2)]
    assert len(streams) == 2
    assert {each.dtype for each in streams} == {torch.float32}


def test_text_to_measure_on_was_not_fitted_to(make_model: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(make_model())
    data = from_documents(
        [f"Chapter {number}: the sea was calm, and {number * 7} ships lay on it." for number in range(200)]
    )
    packed = pack_calibration(data, tokenizer, sequence_length=16, num_fit=8, num_held_out=3)
    assert packed.fit is not None
    assert packed.fit.input_ids.shape == (8, 16)
    assert packed.held_out.input_ids.shape == (3, 16)
    rows = {tuple(row) for row in packed.fit.input_ids.tolist()}
    assert not rows & {tuple(row) for row in packed.held_out.input_ids.tolist()}
    assert (packed.fit.position_ids == 0).any(dim=1).all()
    alone = pack_calibration(data, tokenizer, sequence_length=16, num_fit=0, num_held_out=3)
    assert alone.fit is None


def test_text_too_short_is_refused(make_model: Callable[..., Path]) -> None:
    data = from_documents(["A short one."])
    with pytest.raises(DataError, match=r"calibration: at least 128 tokens of text are required \(got \d+ in"):
        pack_calibration(data, load_tokenizer(make_model()), sequence_length=64, num_fit=2, num_held_out=1)


def _tell(name: str, count: int) -> list[str]:
    return [f"{name} {number}: {name} {number * 7} {name}." for number in range(count)]


@pytest.mark.parametrize("num_fit", [0, 12])
def test_a_mixture_gives_every_part_its_share_of_the_sequences(make_model: Callable[..., Path], num_fit: int) -> None:
    tokenizer = load_tokenizer(make_model())
    parts = [from_documents(_tell("sea", 300), name="sea"), from_documents(_tell("moon", 300), name="moon")]
    mixed = MixedSource.weighted(parts, [3.0, 1.0])
    packed = pack_calibration(mixed, tokenizer, sequence_length=16, num_fit=num_fit, num_held_out=8, seed=1)
    for found, count in ((packed.fit, num_fit), (packed.held_out, 8)):
        if found is None:
            assert count == 0
            continue
        texts = [tokenizer.decode(row) for row in found.input_ids]
        assert [sum("moon" in text for text in texts), len(texts)] == [count // 4, count]
        assert all("moon" in text or "sea" in text for text in texts)
    alone = pack_calibration(parts[1], tokenizer, sequence_length=16, num_fit=num_fit // 4, num_held_out=2, seed=1)
    rows = packed.held_out.input_ids.tolist()
    assert all(row in rows for row in alone.held_out.input_ids.tolist())


def test_a_part_too_short_for_its_share_is_an_error_and_not_another_mixture(make_model: Callable[..., Path]) -> None:
    parts = [from_documents(_tell("sea", 300)), from_documents(_tell("moon", 3), name="moon")]
    mixed = MixedSource.weighted(parts, [1.0, 1.0])
    with pytest.raises(DataError, match=r"8 sequences of 16 tokens are required of moon for its share \(got \d\)"):
        pack_calibration(mixed, load_tokenizer(make_model()), sequence_length=16, num_fit=0, num_held_out=16)
