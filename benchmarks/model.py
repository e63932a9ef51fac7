"""The model: an identity fold beside transformers' own model, and a strict fold beside its source.

    python benchmarks/model.py --write docs/results/model.md
    python benchmarks/model.py --device cuda --write docs/results/model-cuda.md

Both contenders hold the same random weights, in one process, and their runs are interleaved.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch is imported: waiting threads that spin make busy processes on few cores many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from memory import run_python
from page import Page, table
from timing import ROUNDS, Spread, Timings, interleave
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from refold.conversion.convert import ConvertOptions, convert
from refold.modeling.cache_name import CACHE_NAME
from refold.modeling.load import load_model

PROMPT, NEW_TOKENS, CONTEXT = 16, 64, 128
ALLOWED_RATIO, ALLOWED_DIFFERENCE = 1.03, 2e-5
SAMPLE_SECONDS = 0.05
"""A timed sample repeats its work until it lasts about so long, so that a clock tick or a short wait is small in it."""
OURS, THEIRS = "refold", "transformers"
MIB = 2**20

SHAPES: dict[str, dict[str, Any]] = {
    "88M": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
        "tie_word_embeddings": False,
    },
    "10M": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Case:
    """One kind of work on a batch."""

    name: str
    make: Callable[[PreTrainedModel, Tensor], Callable[[], object]]
    batch: int
    tokens: int


def forward(model: PreTrainedModel, tokens: Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.inference_mode():
            model(input_ids=tokens, use_cache=False)

    return run


def decode(model: PreTrainedModel, tokens: Tensor) -> Callable[[], object]:
    """One further token after a context; the cache is cut back after each."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=True, **{CACHE_NAME: cache})
    last = tokens[:, -1:]

    def run() -> None:
        with torch.inference_mode():
            model(input_ids=last, use_cache=True, **{CACHE_NAME: cache})
            cache.crop(-1)

    return run


def train(model: PreTrainedModel, tokens: Tensor) -> Callable[[], object]:
    def run() -> None:
        model.train()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)
        model.eval()

    return run


def generate(model: PreTrainedModel, tokens: Tensor) -> Callable[[], object]:
    mask = torch.ones_like(tokens)

    def run() -> None:
        made = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=tokens,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )
        assert made.shape[1] == tokens.shape[1] + NEW_TOKENS

    return run


CASES = (
    Case(f"decode 1 x 1, {CONTEXT} cached", decode, 1, CONTEXT),
    Case(f"forward 1 x {CONTEXT}", forward, 1, CONTEXT),
    Case(f"forward 8 x {CONTEXT}", forward, 8, CONTEXT),
    Case(f"forward + backward 2 x {CONTEXT}", train, 2, CONTEXT),
    Case(f"generate {NEW_TOKENS}, batch 1", generate, 1, PROMPT),
    Case(f"generate {NEW_TOKENS}, batch 8", generate, 8, PROMPT),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--cases", help="only cases whose name holds this")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of each timing, five or more")
    parser.add_argument("--seconds", type=float, default=2.0, help="go on with rounds for so long in each case")
    parser.add_argument("--write", type=Path, help="results page to write")
    options = parser.parse_args()
    logging.disable_progress_bar()
    cases = [case for case in CASES if options.cases is None or options.cases in case.name]
    page = Page(f"The model beside transformers, measured on {options.device}", options.seed)
    slow: list[str] = []
    with tempfile.TemporaryDirectory(prefix="refold-benchmark-") as work:
        for shape in options.shapes:
            folders = _make_folders(Path(work) / shape, SHAPES[shape], options.seed)
            slow += compare_identity(page, shape, folders, cases, options)
            compare_strict(page, shape, folders, options)
    page.target(
        f"identity fold not slower than transformers' model: no ratio above {ALLOWED_RATIO} beyond noise",
        "; ".join(slow) or "no case slower",
        not slow,
    )
    return min(1, page.finish(options.write))


def compare_identity(
    page: Page, shape: str, folders: dict[str, Path], cases: Sequence[Case], options: argparse.Namespace
) -> list[str]:
    """Times identity fold and transformers' model; returns the cases in which the fold is slower."""
    rows, slow = [], []
    for dtype in options.dtypes:
        models = {
            THEIRS: load_model(folders["source"], dtype=dtype, device=options.device),
            OURS: load_model(folders["identity"], dtype=dtype, device=options.device),
        }
        difference = _largest_difference(models, options)
        if dtype == "float32":
            page.target(
                f"{shape}, float32: logits within {ALLOWED_DIFFERENCE:g} of the largest logit",
                f"{difference:.1e}",
                difference <= ALLOWED_DIFFERENCE,
            )
        for case in cases:
            timings, repeats = _time(case, models, options)
            ratio = timings.ratio(OURS, over=THEIRS)
            verdict = _judge(ratio)
            if verdict == "slower":
                slow.append(f"{shape} {dtype} {case.name}: {ratio.median:.3f}")
            rows.append(
                [
                    f"{dtype}, {case.name}",
                    *(f"{timings.spread(name).median / repeats * 1e3:.2f}" for name in (THEIRS, OURS)),
                    f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
                    f"{timings.best_ratio(OURS, over=THEIRS):.3f}",
                    str(timings.rounds),
                    verdict,
                ]
            )
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    page.section(
        f"Identity fold, {shape}",
        table(["case", f"{THEIRS}, ms", f"{OURS}, ms", "ratio", "ratio of fastest", "rounds", "verdict"], rows),
    )
    return slow


def compare_strict(page: Page, shape: str, folders: dict[str, Path], options: argparse.Namespace) -> None:
    """Times a strict fold beside its source and weighs both, each in a process of its own."""
    rows = []
    names = {"source": THEIRS, "strict": OURS}
    for dtype in options.dtypes:
        held = {name: _weigh(folders[name], dtype, options.device) for name in names}
        rows.append(
            [
                f"{dtype}, memory of weights, MiB",
                *(f"{held[name] / MIB:.1f}" for name in names),
                f"{held['strict'] / held['source']:.3f}",
            ]
        )
        models = {name: load_model(folders[name], dtype=dtype, device=options.device) for name in names}
        for case in CASES[:2]:
            timings, repeats = _time(case, models, options)
            ratio = timings.ratio("strict", over="source")
            rows.append(
                [
                    f"{dtype}, {case.name}, ms",
                    *(f"{timings.spread(name).median / repeats * 1e3:.2f}" for name in names),
                    f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
                ]
            )
    kind = "allocated" if options.device == "cuda" else "anonymous"
    page.section(
        f"Strict recursion beside its source, {shape}",
        f"Two loops over half the layers. Memory: {kind} bytes that loading adds, in a process of its own, embedding "
        "and head included. Strict recursion saves weights; it saves neither FLOPs nor cache, and time only where "
        "reading weights is what takes it.\n\n" + table(["", "source", "strict", "ratio"], rows),
    )


def _make_folders(work: Path, shape: dict[str, Any], seed: int) -> dict[str, Path]:
    torch.manual_seed(seed)
    # Weights large enough that an error would show in the logits.
    config = LlamaConfig(**shape, max_position_embeddings=512, initializer_range=0.1, dtype="float32")
    folders = {name: work / name for name in ("source", "identity", "strict")}
    LlamaForCausalLM(config).save_pretrained(folders["source"])
    convert(folders["source"], folders["identity"], None, options=ConvertOptions(allow_larger=True))
    convert(folders["source"], folders["strict"], "recursive")
    return folders


def _tokens(batch: int, count: int, vocab_size: int, options: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(options.seed + batch * 1000 + count)
    return torch.randint(3, vocab_size, (batch, count), generator=generator).to(options.device)


def _largest_difference(models: dict[str, PreTrainedModel], options: argparse.Namespace) -> float:
    """Largest difference of two models' logits, as a share of the largest logit."""
    tokens = _tokens(2, CONTEXT, models[THEIRS].config.vocab_size, options)
    with torch.inference_mode():
        ours, theirs = (models[name](input_ids=tokens).logits.float() for name in (OURS, THEIRS))
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _time(case: Case, models: dict[str, PreTrainedModel], options: argparse.Namespace) -> tuple[Timings, int]:
    settle = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    runs = {}
    for name, model in models.items():
        runs[name] = case.make(model, _tokens(case.batch, case.tokens, model.config.vocab_size, options))
        runs[name]()
    taken = []
    for run in runs.values():
        settle()
        begun = time.perf_counter()
        run()
        settle()
        taken.append(time.perf_counter() - begun)
    repeats = math.ceil(SAMPLE_SECONDS / min(taken))

    def repeat(run: Callable[[], object]) -> Callable[[], object]:
        def several() -> None:
            for _ in range(repeats):
                run()

        return several

    contenders = {name: repeat(run) for name, run in runs.items()}
    timings = interleave(contenders, options.rounds, warmups=0, seconds=options.seconds, settle=settle)
    return timings, repeats


def _judge(ratio: Spread) -> str:
    if ratio.median <= ALLOWED_RATIO:
        return "not slower"
    return "within noise" if ratio.low <= 1 else "slower"


WEIGH = """
import gc, sys
sys.path.insert(0, {benchmarks!r})
import torch
from memory import anonymous_bytes
from refold.modeling.load import load_model
import transformers.models.llama.modeling_llama, refold.modeling.model
def held():
    gc.collect()
    return torch.cuda.memory_allocated() if {device!r} == "cuda" else anonymous_bytes()
before = held()
model = load_model({folder!r}, dtype={dtype!r}, device={device!r})
# Every weight is read once: what loading left mapped to the file does not pass for free.
total = sum(float(parameter.detach().float().sum()) for parameter in model.parameters())
print(held() - before)
"""


def _weigh(folder: Path, dtype: str, device: str) -> int:
    """Bytes that loading a model adds to a process."""
    code = WEIGH.format(benchmarks=str(Path(__file__).parent), folder=str(folder), dtype=dtype, device=device)
    return int(run_python(["-c", code]).output.split()[-1])


if __name__ == "__main__":
    sys.exit(main())
