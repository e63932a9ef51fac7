"""A short healing run whose losses are written as JSON; under torchrun with FSDP2 if asked.

python benchmarks/short_heal.py FOLDED LOG.json DEVICE SHARDED SEED
"""

import json
import os
import shutil
import sys
from pathlib import Path

import refold
from refold.data.readers import from_documents

TOKENS, CONTEXT, BATCH = 4096, 64, 512


def main(folded: str, log: str, device: str, sharded: str, seed: str) -> None:
    """Heals a small fold on generated text and writes the loss of every step."""
    losses: list[float] = []
    texts = from_documents([f"{word} goes to {word * (2 + n % 9)}." for n in range(64) for word in ("ab", "cde", "f")])
    stage = refold.HealStage.model_validate(
        {
            "objective": "next_token",
            "tokens": TOKENS,
            "context": CONTEXT,
            "batch_tokens": BATCH,
            "learning_rate": 1e-3,
            "seed": int(seed),
        }
    )
    options = refold.HealOptions(
        device=device,
        restart=True,
        sharded=sharded == "1",
        quiet=True,
        on_step=lambda record: losses.append(record.loss),
    )
    out = Path(log).with_suffix(".healed")
    shutil.rmtree(out, ignore_errors=True)
    refold.heal(folded, out, texts, stage, options=options)
    if os.environ.get("RANK", "0") == "0":
        Path(log).write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
