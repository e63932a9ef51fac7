"""Loss in nats per token of a model without one or two of its layers, unhealed.

    python benchmarks/depth.py MODEL --held-out TEXT [--write PAGE]

A base model that loses almost nothing without two layers favours pruning, and cannot show the benefit of recursion.
Single layers are measured on all windows. Pairs are measured on a part of them, and the best pairs then on all.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from page import Page, table
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from refold.data.packing import IGNORED
from refold.data.readers import open_data
from refold.data.tokens import tokenise
from refold.modeling.load import load_model, load_tokenizer
from refold.scoring.agreement import Scores, score
from refold.scoring.predict import predict

GATE = 0.2
NUM_FINALISTS = 5


class Depths:
    """The layers of a model, which can be removed and put back."""

    def __init__(self, model: PreTrainedModel):
        self._stack: Any = model.base_model
        self._name = "depths" if hasattr(self._stack, "depths") else "layers"
        self.layers: list[nn.Module] = list(getattr(self._stack, self._name))

    @contextmanager
    def without(self, left_out: Sequence[int]) -> Iterator[None]:
        self._set(layer for index, layer in enumerate(self.layers) if index not in left_out)
        try:
            yield
        finally:
            self._set(self.layers)

    def _set(self, layers: Any) -> None:
        kept = nn.ModuleList(layers)
        setattr(self._stack, self._name, kept)
        self._stack.config.num_hidden_layers = len(kept)


def read_windows(folder: Path, held_out: Path, context: int, count: int) -> Tensor:
    """Returns `[windows, context]` token ids at equal distances from the whole text."""
    tokens = tokenise(open_data(held_out), load_tokenizer(folder), budget=None, seed=None).tokens
    windows = torch.from_numpy(tokens[: len(tokens) // context * context].astype("int64")).view(-1, context)
    return windows[:: max(1, len(windows) // count)][:count]


@torch.no_grad()
def nats(model: PreTrainedModel, windows: Tensor, batch: int = 16) -> float:
    """Returns the mean loss of all tokens but the first of each window."""
    total = Scores()
    for rows in windows.split(batch):
        total += score(predict(model, rows), functional.pad(rows[:, 1:], (0, 1), value=IGNORED))
    return total.nll / total.num_tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--trial-windows", type=int, default=48)
    parser.add_argument("--write", type=Path, help="page to write")
    given = parser.parse_args()

    page = Page(f"What the layers of {given.model.name} are worth", seed=0)
    model = load_model(given.model, dtype="float32")
    model.eval()
    depths = Depths(model)
    windows = read_windows(given.model, given.held_out, given.context, given.windows)
    trial = windows[:: max(1, len(windows) // given.trial_windows)][: given.trial_windows]

    def cost(left_out: Sequence[int], on: Tensor, whole: float) -> float:
        with depths.without(left_out):
            return nats(model, on) - whole

    tried, whole = nats(model, trial), nats(model, windows)
    indices = range(len(depths.layers))
    singles = [cost([index], windows, whole) for index in indices]
    pairs = {pair: cost(pair, trial, tried) for pair in combinations(indices, 2)}
    finalists = sorted(pairs, key=lambda pair: pairs[pair])[:NUM_FINALISTS]
    finals = {pair: cost(pair, windows, whole) for pair in finalists}
    least = min(finals, key=lambda pair: finals[pair])

    page.section(
        "Layers left out",
        f"Nats per token above the whole model ({whole:.4f}), on {windows.numel():,} held-out tokens, windows of "
        f"{given.context}.\n\n"
        + table(["without layer", "nats per token"], [[str(i), f"{each:+.3f}"] for i, each in enumerate(singles)])
        + f"\n\nOf all {len(pairs)} pairs, tried on {trial.numel():,} tokens, those that cost least, on all:\n\n"
        + table(
            ["without layers", "nats per token"],
            [
                [f"{one} and {other}", f"{finals[one, other]:+.3f}"]
                for one, other in sorted(finals, key=finals.__getitem__)
            ],
        ),
    )
    page.target(
        f"two layers of {len(depths.layers)} cost at least {GATE} nats per token",
        f"{finals[least]:.3f} (layers {least[0]} and {least[1]})",
        finals[least] >= GATE,
    )
    return page.finish(given.write)


if __name__ == "__main__":
    sys.exit(main())
