"""Parts of the GPU benchmark: kernels, models, compiled generation, training, sharded training."""

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import heal_loop
import numpy as np
import torch
from timing import Spread
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers import models as models_of_tokens
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import refold
from refold.mixers.registry import MIXERS
from refold.modeling.load import load_model
from refold.ops import channel_decay, choice, delta_rule, scalar_decay

KERNEL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Root mean square of differences over that of the float64 loop."""
LOGIT_TOLERANCE = 1e-3
"""Largest difference of float32 logits over the largest logit; a card sums in another order, and may use TF32."""
TIE = 1e-4
"""Two best logits that are nearer to each other, over the largest, may change places."""
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SHAPE_135M = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's."""


class Bench:
    """A device, sizes for it, and a folder with the models of all parts.

    Args:
        device: `cuda`, or `cpu` for the rehearsal.
        work: Folder for models; existing models are used again.
        seed: Seed of all random weights and tokens.
    """

    def __init__(self, device: str, work: Path, seed: int):
        self.device, self.work, self.seed = device, work, seed
        self.is_gpu = device == "cuda"
        self.tokens = 700 if self.is_gpu else 200
        self.steps, self.rounds = (10, 3) if self.is_gpu else (1, 2)

    def describe(self) -> str:
        """Returns the sizes in words."""
        big = "SmolLM2-135M's shape" if self.is_gpu else "a shape of a few thousand parameters"
        return (
            f"Kernels: {self.tokens} tokens. Models: Llama with {SMALL['num_hidden_layers']} layers of width "
            f"{SMALL['hidden_size']}. Training: {big}, random weights."
        )

    @cached_property
    def small(self) -> Path:
        """A small Llama with weights large enough to see."""
        return self._source("small", SMALL, 0.3)

    @cached_property
    def trained_shape(self) -> Path:
        """The source of the training parts."""
        return self._source("shape", SHAPE_135M if self.is_gpu else SMALL, 0.02)

    def _source(self, name: str, sizes: Mapping[str, Any], deviation: float) -> Path:
        folder = self.work / name
        if not (folder / "config.json").exists():
            torch.manual_seed(self.seed)
            config = LlamaConfig(**sizes, initializer_range=deviation, bos_token_id=1, eos_token_id=None)
            LlamaForCausalLM(config).save_pretrained(folder)
            _make_tokenizer().save_pretrained(folder)
        return folder

    def fold(self, source: Path, name: str, recipe: Mapping[str, Any]) -> Path:
        """Returns the folder of a fold, made at the first call."""
        folder = self.work / f"{source.name}-{name}"
        if not folder.exists():
            refold.convert(
                source, folder, {**recipe, "seed": self.seed}, options=refold.ConvertOptions(allow_larger=True)
            )
        return folder

    def prompts(self, count: int = 2, length: int = 24) -> Tensor:
        """Random tokens `[count, length]`."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(3, SMALL["vocab_size"], (count, length), generator=generator)

    def settle(self) -> None:
        """Waits until the device has finished."""
        if self.is_gpu:
            torch.cuda.synchronize()


def _make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of single characters."""
    signs = ["<pad>", "<s>", "<unk>", *map(chr, range(32, 127))]
    model = models_of_tokens.WordLevel({sign: index for index, sign in enumerate(signs)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@dataclass
class Found:
    """Rows and targets of one part."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    targets: list[tuple[str, str, bool]] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """One part of the bench.

    Attributes:
        says: Two sentences for the page.
        seconds: Time on one card; with less time left the part does not begin.
        run: Function that measures.
    """

    says: str
    seconds: float
    run: Callable[[Bench], Found]


def kernels(bench: Bench) -> Found:
    """Chunked recurrences on the device, and flash-linear-attention's kernels, beside float64 loops on the CPU."""
    found = Found(("recurrence", "form", "dtype", "outputs", "gradients"))
    forms: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"chunks": lambda op, *x: op.chunked(*x)}
    if bench.is_gpu and importlib.util.find_spec("fla"):
        forms["as chosen (fla)"] = lambda op, q, k, v, *rates: choice.run(op, q, k, v, *rates, state=None, resets=None)
    for name, (op, inputs) in _recurrences(bench).items():
        wanted = _differentiated(lambda *x, op=op: op.naive(*x), [x.double() for x in inputs])
        for form, run in forms.items():
            for dtype, tolerance in KERNEL_TOLERANCE.items():
                # Decays and rates stay in float32, as mixers hand them over.
                moved = [x.to(bench.device, dtype if place < 3 else torch.float32) for place, x in enumerate(inputs)]
                made = _differentiated(lambda *x, op=op, run=run: run(op, *x), moved)
                errors = [_relative(one, other) for one, other in zip(made, wanted, strict=True)]
                found.rows.append((name, form, str(dtype)[6:], f"{errors[0]:.1e}", f"{max(errors[1:]):.1e}"))
                met = max(errors) <= tolerance
                found.targets.append((f"{name}, {form}, {str(dtype)[6:]}: {tolerance:g}", f"{max(errors):.1e}", met))
    return found


def _recurrences(bench: Bench) -> dict[str, tuple[Any, list[Tensor]]]:
    torch.manual_seed(bench.seed)
    batch, tokens, heads, size = 2, bench.tokens, 2, 32
    q, k = (F.normalize(torch.randn(batch, tokens, heads, size), dim=-1) for _ in range(2))
    v = torch.randn(batch, tokens, heads, size)
    decay = F.logsigmoid(torch.randn(batch, tokens, heads) + 2)
    per_channel = F.logsigmoid(torch.randn(batch, tokens, heads, size) + 2)
    beta = torch.rand(batch, tokens, heads)
    return {
        "decay per token": (scalar_decay, [q, k, v, decay]),
        "decay per channel": (channel_decay, [q, k, v, per_channel]),
        "gated delta rule": (delta_rule, [q, k, v, beta, decay]),
    }


def _differentiated(run: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor]) -> list[Tensor]:
    """Returns the outputs, then the gradients of all inputs for a fixed weighting of the outputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, _ = run(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def _relative(found: Tensor, wanted: Tensor) -> float:
    difference = (found.double().cpu() - wanted).square().mean().sqrt()
    return float(difference / wanted.square().mean().sqrt().clamp(min=1e-12))


RECIPES: dict[str, dict[str, Any]] = {
    "strict": {"fold": {"loops": 2}},
    "relaxed": {"fold": {"loops": 2}, "relax": {"rank": 8, "vectors": "own"}},
    "low rank": {"factor": {"parameters": 0.7, "weight": "none"}},
    **{
        name: {"mixers": [{"type": name, "depths": [0, 2], "transfer": ["mlp"]}]}
        for name in MIXERS
        if name != "attention"
    },
}
EXPORTED = ("strict", "relaxed", "low rank")


def models(bench: Bench) -> Found:
    """Forward, generate and dense exports on the device beside the CPU's, float32, for every mixer."""
    found = Found(("fold", "logits", "greedy tokens", "dense export"))
    prompts = bench.prompts()
    for name, recipe in RECIPES.items():
        folder = bench.fold(bench.small, name.replace(" ", "-"), recipe)
        with _exact_products():
            here, there = (load_model(folder, dtype="float32", device=device) for device in ("cpu", bench.device))
            with torch.inference_mode():
                wanted = here(prompts).logits
                difference = _largest(there(prompts.to(bench.device)).logits, wanted)
            same, ties = _compare_generation(here, there, prompts)
            export = _largest_of_export(bench, folder, prompts, wanted) if name in EXPORTED else None
        said = "-" if export is None else f"{export:.1e}"
        found.rows.append((name, f"{difference:.1e}", "equal" if same else f"equal up to {ties} ties", said))
        worst = max(difference, export or 0.0)
        found.targets.append((f"{name}: logits within {LOGIT_TOLERANCE:g}", f"{worst:.1e}", worst <= LOGIT_TOLERANCE))
        found.targets.append((f"{name}: greedy tokens as on the CPU", "equal" if same else f"{ties} ties", ties >= 0))
    return found


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Keeps float32 products from being rounded to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _largest(found: Tensor, wanted: Tensor) -> float:
    return float((found.float().cpu() - wanted).abs().max() / wanted.abs().max())


def _compare_generation(here: PreTrainedModel, there: PreTrainedModel, prompts: Tensor) -> tuple[bool, int]:
    """Returns whether all greedy tokens agree, and the number of rows that differ first at a tie, or -1."""
    settings: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "output_scores": True}
    one, other = (
        model.generate(prompts.to(model.device), return_dict_in_generate=True, **settings)  # pyright: ignore
        for model in (here, there)
    )
    start, ties = prompts.shape[1], 0
    for row, (mine, theirs) in enumerate(zip(one.sequences, other.sequences.cpu(), strict=True)):
        parts = (mine != theirs).nonzero()
        if len(parts):
            scores = one.scores[int(parts[0]) - start][row]
            best = scores.topk(2).values
            if float(best[0] - best[1]) > TIE * float(scores.abs().max()):
                return False, -1
            ties += 1
    return ties == 0, ties


def _largest_of_export(bench: Bench, folder: Path, prompts: Tensor, wanted: Tensor) -> float:
    dense = folder.with_name(folder.name + "-dense")
    if not dense.exists():
        refold.export(folder, dense)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).to(bench.device)  # pyright: ignore
    with torch.inference_mode():
        return _largest(model(prompts.to(bench.device)).logits, wanted)


def compiled(bench: Bench) -> Found:
    """Generation with a static cache, compiled by transformers where the device has it, beside a dynamic cache."""
    found = Found(("fold", "tokens", "tokens/s over dynamic cache"))
    for name in ("strict", "relaxed"):
        folder = bench.fold(bench.small, name, RECIPES[name])
        model = load_model(folder, dtype="float32", device=bench.device)
        prompts = bench.prompts().to(bench.device)
        times, outputs = {}, {}
        for kind in ("dynamic", "static"):
            settings: dict[str, Any] = {"max_new_tokens": 32, "do_sample": False, "cache_implementation": kind}
            outputs[kind] = model.generate(prompts, **settings)  # pyright: ignore
            bench.settle()
            start = time.perf_counter()
            model.generate(prompts, **settings)  # pyright: ignore
            bench.settle()
            times[kind] = time.perf_counter() - start
        same = torch.equal(outputs["dynamic"], outputs["static"])
        found.rows.append((name, "equal" if same else "different", f"{times['dynamic'] / times['static']:.2f}"))
        found.targets.append((f"{name}: static cache gives the same tokens", "equal" if same else "different", same))
    return found


def training(bench: Bench) -> Found:
    """Healing in bfloat16 beside transformers' Trainer: tokens/s, share of the matrix peak, memory."""
    found = Found(("contender", "tokens/s", "share of the measured matrix peak", "peak memory"))
    peak = _matrix_peak(bench)
    per_step = heal_loop.SEQUENCES * heal_loop.CONTEXT
    count = heal_loop.SEQUENCES * (bench.steps + 1)
    speeds: dict[str, list[float]] = {heal_loop.OURS: [], heal_loop.THEIRS: []}
    memory = {}
    with heal_loop.identity_pair(bench.trained_shape, bench.device) as (fold, source):
        texts = heal_loop.documents(source.config.vocab_size, np.full(count, heal_loop.CONTEXT), bench.seed)
        flops = 6 * sum(each.numel() for each in source.parameters())
        loop = heal_loop.make_loop(fold, texts, "bfloat16", device=bench.device)
        loop.model.train()
        heal_loop.run_loop(loop, 1)
        for _ in range(bench.rounds):
            with _watched_memory(bench) as used:
                bench.settle()
                start = time.perf_counter()
                heal_loop.run_loop(loop, bench.steps)
                bench.settle()
                speeds[heal_loop.OURS].append(bench.steps * per_step / (time.perf_counter() - start))
            memory[heal_loop.OURS] = used()
            with _watched_memory(bench) as used:
                taken = heal_loop.run_trainer(source, texts, "bfloat16", bench.steps, bench.device)
                speeds[heal_loop.THEIRS].append(bench.steps * per_step / taken)
            memory[heal_loop.THEIRS] = used()
    for name, values in speeds.items():
        speed = float(np.median(values))
        found.rows.append((name, f"{speed:,.0f}", f"{speed * flops / peak:.1%}", memory[name]))
    ratio = Spread.of([ours / theirs for ours, theirs in zip(*speeds.values(), strict=True)]).median
    found.targets.append(("training: at least Trainer's tokens/s", f"{ratio:.2f}", ratio >= 1.0))
    return found


def _matrix_peak(bench: Bench) -> float:
    """Returns the FLOPs per second of a large bfloat16 product on this device, the reference for shares of the peak."""
    size = 8192 if bench.is_gpu else 256
    a = torch.randn(size, size, device=bench.device, dtype=torch.bfloat16)
    best = 0.0
    for _ in range(5):
        bench.settle()
        start = time.perf_counter()
        torch.mm(a, a)
        bench.settle()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


@contextlib.contextmanager
def _watched_memory(bench: Bench) -> Iterator[Callable[[], str]]:
    if bench.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    yield lambda: f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if bench.is_gpu else "-"


def sharded(bench: Bench) -> Found:
    """Compares a healing run with FSDP2 in one process with the plain one: losses step by step."""
    found = Found(("run", "first loss", "last loss"))
    folder = bench.fold(bench.small, "relaxed", RECIPES["relaxed"])
    losses = {}
    for name, launcher in (
        ("plain", [sys.executable]),
        ("FSDP2", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]),
    ):
        log = bench.work / f"{name}.json"
        script = str(Path(__file__).with_name("short_heal.py"))
        arguments = [str(folder), str(log), bench.device, str(int(name == "FSDP2")), str(bench.seed)]
        done = subprocess.run([*launcher, script, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"gpu: the {name} run failed: {done.stderr[-2000:]}")
        losses[name] = json.loads(log.read_text())
        found.rows.append((name, f"{losses[name][0]:.4f}", f"{losses[name][-1]:.4f}"))
    worst = max(abs(one - other) / abs(one) for one, other in zip(*losses.values(), strict=True))
    found.targets.append(("FSDP2 on one process: losses within 0.5%", f"{worst:.2%}", worst <= 0.005))
    return found


PARTS: dict[str, Part] = {
    "kernels": Part(
        "Relative root-mean-square errors beside a float64 token loop on the CPU, forward and backward.", 60, kernels
    ),
    "models": Part("float32 on the device beside float32 on the CPU; each mixer at two of four depths.", 60, models),
    "compiled": Part("Greedy generation; the first call, which compiles, is outside the clock.", 90, compiled),
    "training": Part(
        "Identity fold in refold's loop beside the source in Trainer, interleaved. 6 FLOPs a parameter and token.",
        120,
        training,
    ),
    "sharded": Part("`heal` under torchrun with one process.", 60, sharded),
}
