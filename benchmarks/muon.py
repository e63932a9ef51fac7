"""Time of a step of refold's Muon, compared with torch's, on the matrices of a model's layers.

python benchmarks/muon.py MODEL [--write PAGE]
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from page import Page, table
from timing import ROUNDS, interleave

from refold.healing.muon import Muon
from refold.modeling.load import load_model

OURS, THEIRS = "refold", "torch.optim.Muon"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--write", type=Path, help="page to write")
    given = parser.parse_args()

    page = Page("A step of Muon", seed=0)
    torch.manual_seed(0)
    model: Any = load_model(given.model, dtype="float32", device=given.device)
    outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    matrices = [each for each in model.parameters() if each.ndim == 2 and id(each) not in outside]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    ours = Muon(matrices, lr=1e-3)
    theirs = torch.optim.Muon(matrices, lr=1e-3, adjust_lr_fn="match_rms_adamw")
    settle = torch.cuda.synchronize if given.device == "cuda" else lambda: None
    taken = interleave({OURS: ours.step, THEIRS: theirs.step}, given.rounds, settle=settle)
    ratio = taken.ratio(OURS, THEIRS)
    page.section(
        f"{len(matrices)} matrices, {sum(each.numel() for each in matrices):,} numbers",
        table(
            ["optimizer", "seconds", "quartiles"],
            [
                [name, f"{spread.median:.3f}", f"{spread.low:.3f} to {spread.high:.3f}"]
                for name, spread in ((name, taken.spread(name)) for name in (OURS, THEIRS))
            ],
        ),
    )
    page.target("a step takes no longer than torch's", f"{ratio.median:.3f} of its time", ratio.median <= 1)
    return page.finish(given.write)


if __name__ == "__main__":
    sys.exit(main())
