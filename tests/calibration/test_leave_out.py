"""Losses without parts equal those of transformers with the parts' updates set to zero."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from refold.calibration.layers import SourceLayers
from refold.calibration.leave_out import measure_left_out
from refold.data.packing import IGNORED, PackedSequence

MODULES = {
    "llama": ("model.layers", "self_attn", "mlp"),
    "gemma2": ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
}
"""Where the layers are, and the modules whose outputs are added to the stream."""
SETS: tuple[tuple[tuple[int, Any], ...], ...] = (
    ((1, "mixer"),),
    ((2, "mlp"),),
    ((1, "mixer"), (2, "mlp")),
    ((1, "mixer"), (1, "mlp")),
    ((0, "mixer"), (3, "mlp")),
    (),
)


@pytest.fixture
def held_out() -> PackedSequence:
    """Two rows of 20 tokens, the second of two documents."""
    ids = torch.randint(2, 95, (2, 21), generator=torch.Generator().manual_seed(7))
    positions = torch.stack([torch.arange(20), torch.cat([torch.arange(12), torch.arange(8)])])
    labels = ids[:, 1:].clone()
    labels[1, 11] = IGNORED
    return PackedSequence(ids[:, :-1], positions, labels)


def silence(module: nn.Module) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    return module.register_forward_hook(hook)


def loss_without(model: nn.Module, variant: str, parts: Any, rows: PackedSequence) -> tuple[float, list[float]]:
    """Returns the mean loss, and the sum of each row's documents, each document run alone."""
    layers, attention, mlp = MODULES[variant]
    names = {"mixer": attention, "mlp": mlp}
    found = model.get_submodule(layers)
    hooks = [silence(found[layer].get_submodule(names[pool])) for layer, pool in parts]  # pyright: ignore[reportIndexIssue]
    sums = []
    for ids, positions, labels in zip(*rows, strict=True):
        ends = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        total = 0.0
        for first, end in itertools.pairwise(ends):
            logits = model(ids[None, first:end]).logits[0]
            total += float(nn.functional.cross_entropy(logits, labels[first:end], reduction="sum"))
        sums.append(total)
    for hook in hooks:
        hook.remove()
    return sum(sums) / int((rows.labels != IGNORED).sum()), sums


@pytest.mark.parametrize("variant", MODULES)
@torch.no_grad()
def test_losses_are_those_of_transformers_without_the_parts(make_source, open_source, held_out, tmp_path, variant):
    folder = make_source(variant)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    found = measure_left_out(open_source(folder).layers, held_out, SETS, tmp_path)
    source, rows = loss_without(model, variant, (), held_out)
    assert found.source == pytest.approx(source, abs=2e-5)
    counts = (held_out.labels != IGNORED).sum(dim=1).tolist()
    for parts, increase, error in zip(SETS, found.increases, found.errors, strict=True):
        without, without_rows = loss_without(model, variant, parts, held_out)
        assert increase == pytest.approx(without - source, abs=5e-5)
        changes = [one - other for one, other in zip(without_rows, rows, strict=True)]
        off = [change - count * (without - source) for change, count in zip(changes, counts, strict=True)]
        assert error == pytest.approx((2 * sum(each**2 for each in off)) ** 0.5 / sum(counts), abs=5e-5)
    # A control: the sets differ, and losses of pairs are not the sums of single losses.
    assert min(abs(a - b) for a, b in itertools.combinations(found.increases, 2)) > 1e-3
    assert abs(found.increases[2] - found.increases[0] - found.increases[1]) > 1e-3


@torch.no_grad()
def test_streams_in_files_give_the_same_bits_and_are_deleted(make_source, open_source, held_out, tmp_path) -> None:
    layers = open_source(make_source("llama")).layers
    held = measure_left_out(layers, held_out, SETS, tmp_path)
    one = 2 * 20 * 32 * 4
    seen: list[int] = []
    filed = measure_left_out(
        layers,
        held_out,
        SETS,
        tmp_path,
        memory=2 * one,
        progress=lambda done: seen.append(len(list(tmp_path.iterdir()))),
    )
    assert filed == held
    # Streams that have begun after each layer, less two in memory; at last one of these two had an end.
    assert seen == [0, 2, 4, 5]
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_sets_share_the_pass_before_their_first_part(make_source, open_source, held_out, tmp_path, monkeypatch) -> None:
    layers = open_source(make_source("llama")).layers
    loaded: list[tuple[int, tuple[str, ...]]] = []
    load = SourceLayers.load

    def watch(self: SourceLayers, index: int, pools: Any = ("mixer", "mlp")) -> Any:
        loaded.append((index, tuple(pools)))
        return load(self, index, pools)

    monkeypatch.setattr(SourceLayers, "load", watch)
    measure_left_out(layers, held_out, [[(2, "mixer")], [(2, "mixer"), (3, "mixer"), (3, "mlp")]], tmp_path)
    both = ("mixer", "mlp")
    assert loaded == [(0, both), (1, both), (2, ("mlp",)), (2, both), (3, both)]
