"""Runs folders in mlx-lm: reads jobs as JSON from stdin, writes answers as JSON to the file `ANSWERS`.

It runs in the environment that `REFOLD_MLX_PYTHON` names, which has mlx-lm but not refold.
"""

import json
import os
import sys
from pathlib import Path

import mlx.core as mx  # pyright: ignore[reportMissingImports]
from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]


def answer(job):
    model, _ = load_model(Path(job["model"]))
    found = {"tokens": [], "logprobs": []}
    for prompt in job["prompts"]:
        cache = model.make_cache() if hasattr(model, "make_cache") else None
        logits = model(mx.array([prompt]), cache=cache)[0, -1].astype(mx.float32)
        found["logprobs"].append((logits - mx.logsumexp(logits)).tolist())
        tokens = []
        for _ in range(job["num_tokens"]):
            tokens.append(int(mx.argmax(logits)))
            logits = model(mx.array([[tokens[-1]]]), cache=cache)[0, -1].astype(mx.float32)
        found["tokens"].append(tokens)
    return found


if __name__ == "__main__":
    answers = [answer(job) for job in json.load(sys.stdin)]
    with open(os.environ["ANSWERS"], "w", encoding="utf-8") as out:
        json.dump(answers, out)
