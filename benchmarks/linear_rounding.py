"""Losses of rounded weights: plain, with searched ranges, and with error feedback, beside llama.cpp's formats.

    python benchmarks/linear_rounding.py MODEL --data train.parquet --held-out validation.parquet [--recipe relaxed]

MODEL is a source; with a recipe its fold is measured. Embedding and head stay floats, so that the linears alone are
compared. Every loss is that of the dequantised weights in float32.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from refold.blueprint.integers import find_scheme
from refold.blueprint.quantisation import is_quantised
from refold.blueprint.tensors import float_tensors
from refold.calibration.calibration import pack_calibration
from refold.checkpoint.folded_tensors import read_blueprint
from refold.checkpoint.reader import CheckpointReader
from refold.conversion.convert import ConvertOptions, convert
from refold.conversion.rounding_pass import RoundingPass, RoundingText
from refold.conversion.sequential import FittedTensors
from refold.data.corpus import open_text
from refold.data.packing import PackedSequence
from refold.modeling.load import load_model, load_tokenizer
from refold.nn.rounding import round_weight

Rounder = Callable[[Tensor], Tensor]


def main() -> None:
    """Prints a line for each way of rounding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--recipe")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--held-out-tokens", type=int, default=65_536)
    parser.add_argument("--schemes", nargs="*", default=("int8", "int4", "int4z"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(given, Path(scratch))
    for row in rows:
        print(json.dumps(row))
    if given.out is not None:
        given.out.write_text(json.dumps(rows, indent=2) + "\n")


def measure(given: argparse.Namespace, scratch: Path) -> list[dict]:
    """Returns loss, change and bits per weight of each way of rounding."""
    folder, data = scratch / "folded", open_text(given.data, limit=2**26)
    convert(
        given.model, folder, given.recipe, options=ConvertOptions(allow_larger=True),
        calibration=data if given.recipe in ("compact", "lowrank") else None,
    )  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    blueprint = read_blueprint(str(folder), config)
    model, tokenizer = load_model(folder, dtype="float32", device="cpu"), load_tokenizer(folder)
    length = min(512, blueprint.arch.max_position_embeddings)

    def pack(text: str, tokens: int) -> PackedSequence:
        return pack_calibration(
            open_text(text, limit=2**26), tokenizer, sequence_length=length, num_fit=0, num_held_out=tokens // length
        ).held_out

    text, held_out = pack(given.data, given.tokens), pack(given.held_out, given.held_out_tokens)
    linears = [each.name for each in float_tensors(blueprint) if is_quantised(blueprint, each)]
    sizes = {each.name: each.shape for each in float_tensors(blueprint)}
    whole = sum(sizes[name][0] * sizes[name][1] for name in linears)
    with CheckpointReader(folder, blueprint) as reader:
        floats = {name: reader.read(name, torch.float32) for name in linears}

        def by_text(scheme: str) -> Mapping[str, Tensor]:
            place = scratch / f"feedback-{scheme}"
            place.mkdir()
            found = RoundingPass(blueprint, dict.fromkeys(linears, scheme), reader, FittedTensors(place))
            with torch.inference_mode():
                return {name: rounded.dequantise() for name, rounded in found.run(RoundingText(text))}

        rows: list[dict] = []
        exact: list[Tensor] = []

        def add(name: str, weights: Mapping[str, Tensor], num_bytes: int, seconds: float) -> None:
            loss, divergence = score(model, {**floats, **weights}, held_out, exact)
            change = loss - rows[0]["loss"] if rows else 0.0
            bits = 8 * num_bytes / whole
            rows.append(
                {"weights": name, "loss": loss, "change": change, "kl": divergence, "bits": bits, "seconds": seconds}
            )
            print(rows[-1], flush=True)

        add("float32", {}, 4 * whole, 0.0)
        for name in ("q8_0", "q4_0", "q4_1"):
            rounder = ggml_rounder(name)
            if rounder is not None and all(sizes[each][1] % 32 == 0 for each in linears):
                bits = {"q8_0": 8.5, "q4_0": 4.5, "q4_1": 5.0}[name]
                add(name, {each: rounder(value) for each, value in floats.items()}, int(bits * whole / 8), 0.0)
        for scheme in given.schemes:
            rule = find_scheme(scheme)
            num_bytes = sum(rule.num_bytes(*sizes[name]) for name in linears)
            begun = time.perf_counter()
            plain = {name: round_weight(value, rule).dequantise() for name, value in floats.items()}
            add(f"{scheme}, whole ranges", plain, num_bytes, time.perf_counter() - begun)
            begun = time.perf_counter()
            searched = {
                name: round_weight(value, rule, torch.ones(value.shape[1])).dequantise()
                for name, value in floats.items()
            }
            add(f"{scheme}, searched ranges", searched, num_bytes, time.perf_counter() - begun)
            begun = time.perf_counter()
            add(f"{scheme}, feedback", by_text(scheme), num_bytes, time.perf_counter() - begun)
    return rows


def ggml_rounder(name: str) -> Rounder | None:
    """Returns llama.cpp's rounding of a format by the package gguf; None without the package."""
    try:
        import gguf
    except ImportError:
        return None
    kind = gguf.GGMLQuantizationType[name.upper()]

    def rounder(weight: Tensor) -> Tensor:
        packed = gguf.quants.quantize(weight.numpy(), kind)
        return torch.from_numpy(gguf.quants.dequantize(packed, kind))

    return rounder


@torch.no_grad()
def score(
    model: torch.nn.Module, weights: Mapping[str, Tensor], text: PackedSequence, exact: list[Tensor]
) -> tuple[float, float]:
    """Returns the mean loss of a model with other weights, and the divergence from the float model, in nats per token.

    Args:
        model: The model.
        weights: Its other weights.
        text: Tokens.
        exact: Log-probabilities of the float model, which the first call adds.
    """
    for name, value in weights.items():
        model.get_parameter(name).copy_(value)
    total, count, divergence = 0.0, 0, 0.0
    for row in range(0, len(text.input_ids), 4):
        ids, places = text.input_ids[row : row + 4], text.position_ids[row : row + 4]
        labels = ids.masked_fill(places == 0, -100)
        logits = model(ids, position_ids=places).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        total, count = total + float(loss), count + int((labels[:, 1:] >= 0).sum())
        if len(exact) <= row // 4:
            exact.append(logits.log_softmax(-1))
        divergence += float((exact[row // 4].exp() * (exact[row // 4] - logits.log_softmax(-1))).sum())
    return total / count, divergence / (text.input_ids.numel() - len(text.input_ids))


if __name__ == "__main__":
    main()
