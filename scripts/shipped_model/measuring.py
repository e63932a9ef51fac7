"""Held-out bits per byte of the model, whole and with layers left out."""

import itertools
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from shipped_model.run_folder import CONTEXT, final_model, load_tokens, write_json

STRIDE = 256


@torch.no_grad()
def measure_bits(model: LlamaForCausalLM, tokens: Tensor, stride: int, batch: int = 64) -> float:
    """Returns the bits of all tokens but the first, each scored once with up to `CONTEXT` tokens in view."""
    model.eval()
    starts = [*range(0, len(tokens) - CONTEXT, stride), len(tokens) - CONTEXT]
    known = [0, *(start + CONTEXT - 1 for start in starts[:-1])]  # the last token scored before each window
    first = torch.tensor([before - start for before, start in zip(known, starts, strict=True)], device=tokens.device)
    assert int(first.min()) >= 0, "every token is the target of some window"
    offsets = torch.arange(CONTEXT, device=tokens.device)
    nats = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for rows in torch.arange(len(starts)).split(batch):
        begin = torch.tensor(starts, device=tokens.device)[rows[0] : rows[-1] + 1, None]
        window = tokens[begin + offsets].long()
        logits = model(input_ids=window, use_cache=False).logits[:, :-1].float()
        losses = functional.cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="none")
        nats += losses[offsets[:-1] >= first[rows[0] : rows[-1] + 1, None]].double().sum()
    return nats.item() / math.log(2)


def measure(run: Path, device: str) -> None:
    """Writes `measurements.json`: held-out bits per byte in bf16, whole and with layers left out.

    Each layer and each pair is tried on every 16th window; the two pairs that cost least then on all.
    """
    _, tokens, num_bytes = load_tokens(run, device)
    sample = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)[::16].flatten()
    sample_bytes = num_bytes * len(sample) / len(tokens)
    model = final_model(run)
    nn.Module.to(model, device)
    layers = list(model.model.layers)

    def leave_out(without: tuple[int, ...]) -> LlamaForCausalLM:
        model.model.layers = nn.ModuleList(layer for i, layer in enumerate(layers) if i not in without)
        model.config.num_hidden_layers = len(model.model.layers)
        return model

    def on_sample(*without: int) -> float:
        return measure_bits(leave_out(without), sample, CONTEXT - 1, batch=16) / sample_bytes

    def on_all(*without: int) -> float:
        return measure_bits(leave_out(without), tokens, STRIDE, batch=16) / num_bytes

    whole = on_sample()
    singles = [on_sample(i) - whole for i in range(len(layers))]
    pairs = {pair: on_sample(*pair) - whole for pair in itertools.combinations(range(len(layers)), 2)}
    least = sorted(pairs, key=lambda pair: pairs[pair])[:2]
    whole = on_all()
    without_pair, best = min((on_all(*pair) - whole, pair) for pair in least)
    result = {
        "held_out_bits_per_byte": round(whole, 4),
        "without_layer": [round(loss, 4) for loss in singles],
        "least_important_pair": list(best),
        "without_pair": round(without_pair, 4),
    }
    write_json(run / "measurements.json", result)
    print(json.dumps(result), flush=True)
