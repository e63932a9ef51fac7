"""The least time that the rates of a machine allow for a workload of a Llama shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from contest import Case
from timing import Spread

BITS = {
    "float32": 32.0,
    "F32": 32.0,
    "bfloat16": 16.0,
    "BF16": 16.0,
    "int8": 8.0,
    "Q8_0": 8.5,
    "int4": 5.0,
    "Q4_0": 4.5,
}
"""Bits of a weight with its scales; int4 has a scale and a zero of 16 bits for 32 weights."""


@dataclass(frozen=True)
class Roofline:
    """Rates and sizes.

    Attributes:
        config: `config.json` of the shape.
        machine: `read` and `copy` in bytes per second, `float32` and `bfloat16` in FLOPs per second.
    """

    config: Mapping[str, Any]
    machine: Mapping[str, float]

    def share(self, case: Case, who: str, speed: Spread) -> float | None:
        """Returns the least time over the measured one; None for a name without a known dtype.

        Prefill is one pass over all prompts, decoding one pass for each further token of all rows. A pass takes as
        long as reading all weights, or as multiplying by them, whichever is longer. Keys and values are not counted.
        """
        weights = next((name for name in BITS if who.endswith(f", {name}")), None)
        if weights is None:
            return None
        count = linear_weights(self.config)
        read = count * BITS[weights] / 8 / max(self.machine["read"], self.machine["copy"])
        rate = self.machine["float32" if weights in ("float32", "F32") else "bfloat16"]
        rows, new = len(case.request["prompts"]), case.request["new"][0]
        prompt = sum(map(len, case.request["prompts"]))
        least = max(read, 2 * count * prompt / rate) + (new - 1) * max(read, 2 * count * rows / rate)
        return least / (case.num_new / speed.median)


def linear_weights(config: Mapping[str, Any]) -> int:
    """Returns the number of weights that a token is multiplied by, head included."""
    head = config["hidden_size"] * config["vocab_size"]
    return head + config["num_hidden_layers"] * sum(rows * columns for rows, columns in _linears(config))


def lora_share(config: Mapping[str, Any], rank: int) -> float:
    """Returns the weights of LoRAs of a rank on every linear of every depth, over all weights that a token meets."""
    adapters = config["num_hidden_layers"] * sum(rank * (rows + columns) for rows, columns in _linears(config))
    return adapters / linear_weights(config)


def _linears(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * (config.get("head_dim") or width // config["num_attention_heads"])
    attention = [(width, width), (keys, width), (keys, width), (width, width)]
    return [*attention, (inner, width), (inner, width), (width, inner)]
