"""Recurrences and whole mixers on a GPU: refold's own forms beside flash-linear-attention's kernels, and attention."""

import argparse
import importlib.util
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from mixer_clock import Clock
from mixer_work import ATTENTION, BARE, HEAD_SIZE, HEADS, WHOLE, WIDTH, LoneMixer, Work
from page import Page, table
from torch import Tensor

from refold.ops import kernels
from refold.ops.kernels import VARIABLE

OURS, THEIRS = "refold", "flash-linear-attention"
DTYPE = torch.bfloat16
TOLERANCE = 0.02
KERNELS: Mapping[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "retention": kernels.scalar_decay,
    "SSD": kernels.scalar_decay,
    "gated delta rule": kernels.delta_rule,
    "decay per channel": kernels.channel_decay,
    "no decay": lambda q, k, v: kernels.scalar_decay(q, k, v, None),
}
"""By name of the bare recurrence."""


def why_not(device: str) -> str:
    """Returns the reason why kernels cannot be compared, or an empty string."""
    if device != "cpu" and not torch.cuda.is_available():
        return "a CUDA device is required (got none)"
    return "" if importlib.util.find_spec("fla") else "flash-linear-attention is required; install refold's extra `gpu`"


def compare_kernels(page: Page, options: argparse.Namespace, passes: Mapping[str, Callable[[Work], None]]) -> None:
    """Bare recurrences, then whole mixers, each with and without kernels."""
    page.section(
        "Sizes",
        f"One row, bfloat16, width {WIDTH}, {HEADS} heads with keys and values of {HEAD_SIZE}. {OURS}: its own chunks "
        f"in PyTorch, states and products in float32. {THEIRS}: its kernels. Attention is PyTorch's "
        "`scaled_dot_product_attention`, causal. Where PyTorch has finished is waited for before each clock is read.",
    )
    bare: dict[tuple[str, str], Callable[[int], Work]] = {
        (ATTENTION, ""): partial(_bare, ATTENTION, BARE[ATTENTION].run, options.device)
    }
    whole: dict[tuple[str, str], Callable[[int], Work]] = {
        (ATTENTION, ""): partial(_whole, ATTENTION, options.device, "")
    }
    for name, kernel in KERNELS.items():
        bare[name, OURS] = partial(_bare, name, BARE[name].run, options.device)
        bare[name, THEIRS] = partial(_bare, name, kernel, options.device)
    for name in WHOLE:
        if name not in (ATTENTION, "mamba"):
            for who in (OURS, THEIRS):
                whole[name, who] = partial(_whole, name, options.device, who)
    _check(page, bare, options)
    for title, makers in (("Bare recurrences", bare), ("Whole mixers", whole)):
        for kind, run in passes.items():
            _time(page, f"{title}, {kind}", makers, run, options)


def _check(page: Page, makers: Mapping[tuple[str, str], Callable[[int], Work]], options: argparse.Namespace) -> None:
    """Checks that both give the same outputs for the same inputs."""
    for name in KERNELS:
        found = []
        for who in (OURS, THEIRS):
            torch.manual_seed(options.seed)
            found.append(makers[name, who](options.lengths[0]).call().detach().float())
        error = float((found[0] - found[1]).square().mean().sqrt() / found[0].square().mean().sqrt())
        page.target(f"{name}: outputs off each other by at most {TOLERANCE}", f"{error:.1e}", error <= TOLERANCE)


def _time(
    page: Page,
    title: str,
    makers: Mapping[tuple[str, str], Callable[[int], Work]],
    run: Callable[[Work], None],
    options: argparse.Namespace,
) -> None:
    settle = torch.cuda.synchronize if options.device != "cpu" else (lambda: None)
    works = {(", ".join(key), tokens): make(tokens) for key, make in makers.items() for tokens in options.lengths}
    clock = Clock({key: partial(run, work) for key, work in works.items()}, options.rounds, settle=settle)
    attention = f"{ATTENTION}, "
    rows = []
    for name, who in makers:
        row = [name, who]
        for tokens in options.lengths:
            key = f"{name}, {who}", tokens
            over = clock.ratio(key, over=(attention, tokens))
            row += [clock.ms(key), f"{over.median:.2f} ({over.low:.2f} to {over.high:.2f})"]
        rows.append(row)
    columns = (f"{tokens:,} tokens{what}" for tokens in options.lengths for what in (", ms", ", over attention"))
    page.section(title, table(["", "", *columns], rows))


def _bare(name: str, run: Callable[..., Any], device: str, tokens: int) -> Work:
    inputs = BARE[name].make(tokens)
    # Queries, keys and values come in the model's dtype, rates in float32.
    placed = [x.to(device, DTYPE if place < 3 else torch.float32) for place, x in enumerate(inputs)]
    leaves = [x.requires_grad_(x.dim() > 1) for x in placed]
    return Work(lambda: run(*leaves)[0], [x for x in leaves if x.requires_grad])


def _whole(name: str, device: str, who: str, tokens: int) -> Work:
    lone = LoneMixer.named(name)
    lone.mixer.to(device, DTYPE)
    lone.rotary.to(device)
    x = torch.randn(1, tokens, WIDTH, device=device, dtype=DTYPE, requires_grad=True)
    call = lone.bind(x)

    def chosen() -> Tensor:
        os.environ[VARIABLE] = "torch" if who == OURS else "auto"
        return call()

    return Work(chosen, [x, *lone.mixer.parameters()])
