"""Time, memory and agreement of the distillation loss of one batch, with and without full logits.

    python benchmarks/distil_loss.py CONTENDER PRECISION TOKENS SEED

This command runs one contender once and prints its memory before the run; `heal.py` measures it from outside.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from memory import anonymous_bytes
from torch import Tensor
from torch.nn import functional as F

from refold.scoring.chunked import Objectives, chunked_loss
from refold.scoring.head import Head, Predictions

VOCAB_SIZE, WIDTH, TOKENS = 131_072, 1024, 2048
WEIGHT = 0.5  # of cross-entropy and of forward KL
OURS, NAIVE = "refold", "full logits"


@dataclass
class Batch:
    """Last hidden states of student and teacher, both heads, and labels.

    The student's are float32; the teacher's, and all matrix products, are of the precision.
    """

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    precision: torch.dtype

    @classmethod
    def make(cls, precision: str, tokens: int, seed: int) -> "Batch":
        generator = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, precision)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.empty(shape).normal_(0, scale, generator=generator)

        # Logits of a standard deviation of about 3, so that distributions are neither flat nor certain.
        return cls(
            draw(tokens, WIDTH).requires_grad_(),
            draw(VOCAB_SIZE, WIDTH, scale=0.1).requires_grad_(),
            draw(tokens, WIDTH).to(dtype),
            draw(VOCAB_SIZE, WIDTH, scale=0.1).to(dtype),
            torch.randint(VOCAB_SIZE, (tokens,), generator=generator),
            dtype,
        )

    def few(self, count: int) -> "Batch":
        """Returns a batch with other numbers of positions and tokens, and with new weights."""

        def cut(part: Tensor) -> Tensor:
            return part[:count].detach().clone().requires_grad_(part.requires_grad)

        heads = cut(self.weight), cut(self.teacher_weight)
        return Batch(
            cut(self.hidden), heads[0], cut(self.teacher_hidden), heads[1], self.labels[:count] % count, self.precision
        )

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def forget(self) -> None:
        """Drops gradients."""
        self.hidden.grad = self.weight.grad = None


def full_logits(batch: Batch) -> Tensor:
    """Computes the loss as a plain training script: logits of both models, PyTorch's two losses, autograd."""
    with batch.autocast():
        logits = F.linear(batch.hidden, batch.weight).float()
        with torch.no_grad():
            target = F.linear(batch.teacher_hidden, batch.teacher_weight).float().log_softmax(-1)
        divergence = F.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="batchmean")
        loss = WEIGHT * F.cross_entropy(logits, batch.labels) + WEIGHT * divergence
    loss.backward()
    return loss.detach()


def refold_loss(batch: Batch) -> Tensor:
    student = Predictions(batch.hidden, Head(batch.weight))
    teacher = Predictions(batch.teacher_hidden, Head(batch.teacher_weight))
    with batch.autocast():
        loss = chunked_loss(student, batch.labels, Objectives(WEIGHT, {"forward_kl": WEIGHT}), teacher=teacher).total
    loss.backward()
    return loss.detach()


def trl_loss(batch: Batch) -> Tensor:
    """TRL's two functions on tiles of the vocabulary, which compute logits anew in the backward pass."""
    from trl.kernels.chunked_divergence import (  # pyright: ignore[reportMissingImports]
        VOCAB_CHUNK_SIZE,
        ChunkedDivergenceFunction,
    )
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # pyright: ignore[reportMissingImports]

    student = batch.hidden, batch.weight, None
    with batch.autocast():
        divergence, _ = ChunkedDivergenceFunction.apply(  # pyright: ignore
            *student, batch.teacher_hidden, batch.teacher_weight, None, 0.0
        )
        log_probability, *_ = ChunkedLogProbFunction.apply(  # pyright: ignore
            *student, batch.labels, 1.0, VOCAB_CHUNK_SIZE, None, 1.0, ()
        )
        loss = WEIGHT * divergence.mean() - WEIGHT * log_probability.mean()
    loss.backward()
    return loss.detach()


CONTENDERS: dict[str, Callable[[Batch], Tensor]] = {NAIVE: full_logits, OURS: refold_loss}
try:
    TRL_VERSION: str | None = version("trl")
except PackageNotFoundError:
    TRL_VERSION = None
else:
    CONTENDERS["TRL"] = trl_loss


def run_once(contender: str, precision: str, tokens: str, seed: str) -> None:
    batch = Batch.make(precision, int(tokens), int(seed))
    # The first product of each kind makes the libraries' own buffers.
    CONTENDERS[contender](batch.few(32))
    print(anonymous_bytes(), flush=True)
    CONTENDERS[contender](batch)


if __name__ == "__main__":
    run_once(*sys.argv[1:])
