"""Decoding speed of stored integers at batch 1: transformers' `generate`, and the engine.

    python benchmarks/quantised.py SOURCE [--recipe recursive] [--tokens 128] [--threads 2]

The source, or its fold, is written as bfloat16 and with int8 and int4 linears. Each form decodes one prompt; the best
of three is printed. Run it on a quiet machine.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from refold.conversion.convert import ConvertOptions, convert
from refold.conversion.quantise import quantise
from refold.engine.engine import Engine
from refold.engine.settings import EngineSettings
from refold.generation.sampling import Sampling
from refold.modeling.load import load_model

PROMPT = list(range(5, 37))


def main() -> None:
    """Prints tokens per second of each form by each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--recipe")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        convert(given.source, scratch / "floats", given.recipe, options=ConvertOptions(allow_larger=True))
        for to in ("int8", "int4"):
            quantise(scratch / "floats", scratch / to, to)
        forms = (("floats", "float32"), ("floats", "bfloat16"), ("int8", "bfloat16"), ("int4", "bfloat16"))
        for folder, dtype in forms:
            rate = generate_rate(scratch / folder, dtype, given.tokens)
            print(json.dumps({"way": "generate", "weights": folder, "dtype": dtype, "tokens_per_second": rate}))
        for folder, weights in (("floats", "float32"), ("floats", "bfloat16"), ("int8", "auto"), ("int4", "auto")):
            rate = engine_rate(scratch / folder, weights, given.tokens)
            print(json.dumps({"way": "engine", "weights": folder, "as": weights, "tokens_per_second": rate}))


@torch.no_grad()
def generate_rate(folder: Path, dtype: str, tokens: int) -> float:
    """Returns tokens per second of transformers' `generate`, the prompt's time included."""
    model: Any = load_model(folder, dtype=dtype, device="cpu")
    ids = torch.tensor([PROMPT])
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return tokens / _least_seconds(lambda: model.generate(ids, **options))


def engine_rate(folder: Path, weights: str, tokens: int) -> float:
    """Returns tokens per second of the engine, the prompt's time included."""
    engine = Engine(folder, EngineSettings(weights=weights, max_rows=1, max_context=len(PROMPT) + tokens))
    sampling = Sampling(max_new_tokens=tokens, ignore_eos=True)
    return tokens / _least_seconds(lambda: engine.generate([PROMPT], sampling))


def _least_seconds(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begun)
    return best


if __name__ == "__main__":
    main()
