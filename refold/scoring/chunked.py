"""Cross-entropy and distillation losses that hold the logits of a block of tokens at a time.

The gradient of a token's loss depends only on the logits of this token. So the forward pass computes, block by block,
the loss and also the gradients of hidden states and head, and the backward pass only scales them. Memory holds the
logits of one block, and the gradients of hidden states and head, which training needs anyway.

There are two sizes. A block is the unit of matrix products. Each block reads the whole head and its gradient, so blocks
must not be small. The logits of a block have the dtype of the products, and gradients overwrite them. Within a block,
some rows at a time are computed in float32, few enough for the caches of a CPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from refold.errors import HealError
from refold.scoring.divergences import DIVERGENCES
from refold.scoring.head import CHUNK_BYTES, Head, Predictions, check_same_vocabulary, chunks, scored_positions
from refold.scoring.head_gradients import HeadGradients, Needs
from refold.scoring.stored import StoredPredictions, stored_forward_kl
from refold.suggest import did_you_mean

BLOCK_SHARE, LARGEST_BLOCK = 0.25, 512 * 2**20
"""Size of a block's logits, student and teacher together: this share of the larger of all logits and the head's
gradient, at most `LARGEST_BLOCK` and at least `CHUNK_BYTES` bytes."""
_ROWS_BYTES = {"cpu": 4 * 2**20}
"""Bytes of the float32 logits computed at a time, by kind of device; `CHUNK_BYTES` for other devices."""


@dataclass(frozen=True)
class Objectives:
    """The terms of a loss: `cross_entropy * CE + sum of divergences[name] * temperature^2 * D_name`.

    Attributes:
        cross_entropy: Weight of the cross-entropy with the labels, at temperature 1.
        divergences: Weights by name of `DIVERGENCES`.
        temperature: Divisor of the logits of both models within divergences. The factor `temperature^2` keeps the size
            of gradients (arXiv 1503.02531, section 2).

    Raises:
        HealError: A divergence is unknown, a weight is negative, or the temperature is not positive.
    """

    cross_entropy: float = 1.0
    divergences: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, weight in {"cross_entropy": self.cross_entropy, **self.divergences}.items():
            if name != "cross_entropy" and name not in DIVERGENCES:
                hint = did_you_mean(name, DIVERGENCES)
                raise HealError(f"divergences: one of {', '.join(DIVERGENCES)} is required (got '{name}'){hint}")
            if weight < 0:
                raise HealError(f"{name}: a weight of at least 0 is required (got {weight})")
        if self.temperature <= 0:
            raise HealError(f"temperature: a number above 0 is required (got {self.temperature})")


class ChunkedLoss(NamedTuple):
    """A loss and its terms.

    Attributes:
        total: The loss with gradient; float32 (float64 for float64 inputs).
        means: Terms by name (`cross_entropy` and each divergence), without weights and gradients: sums over the scored
            tokens divided by the denominator of `total`.
        num_tokens: Number of scored tokens of this call.
    """

    total: Float[Tensor, ""]
    means: dict[str, Float[Tensor, ""]]
    num_tokens: int


def chunked_loss(
    student: Predictions,
    labels: Int64[Tensor, "*M"],
    objectives: Objectives | None = None,
    *,
    teacher: Predictions | None = None,
    stored: StoredPredictions | None = None,
    num_tokens: int | None = None,
    chunk_bytes: int | None = None,
) -> ChunkedLoss:
    """Returns the mean loss over the positions whose label is not -100, with its gradients computed already.

    `student.hidden`, `student.head.weight`, `.bias` and `.lora` get gradients if they require them; a tied embedding
    gets the gradient of the head as well. The loss can be differentiated once.

    Args:
        student: Hidden states `[*M, D]` and head.
        labels: The id that each position predicts (already shifted); -100: the position is in no term of the loss.
        objectives: Weights of the terms; None: cross-entropy alone.
        teacher: Hidden states `[*M, Dt]` and head of the teacher, without gradient. Divergences need it, or `stored`.
        stored: Stored predictions of the teacher, for the forward KL at temperature 1.
        num_tokens: Denominator of the means, for gradient accumulation (the tokens of all micro-batches); None: the
            scored tokens of this call. Scaling the loss instead would cost a copy of the head's gradient.
        chunk_bytes: Size of the logits of a block, counted in float32; None: see `BLOCK_SHARE`.

    Raises:
        HealError: Divergences have no teacher, or cannot be computed from stored predictions.
        SourceError: The vocabularies differ.
    """
    objectives = objectives or Objectives()
    target = _target(student, teacher, stored, objectives)
    index = scored_positions(labels)
    kept = labels.reshape(-1) if index is None else labels.reshape(-1).index_select(0, index)
    student = student.flat(index)
    device = student.hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student.head.weight.dtype
    call = _Call(
        head=student.head,
        labels=kept,
        objectives=objectives,
        teacher=None if target is None else target.flat(index),
        denominator=max(1, len(kept) if num_tokens is None else num_tokens),
        dtype=dtype,
        block_bytes=_block_bytes(student.head, len(kept), dtype) if chunk_bytes is None else chunk_bytes,
        wants_gradients=torch.is_grad_enabled(),
    )
    head = student.head
    total, means = _ChunkedLoss.apply(  # pyright: ignore
        student.hidden, head.weight, head.bias, *(head.lora or (None, None)), call
    )
    names = ["cross_entropy", *objectives.divergences]
    return ChunkedLoss(total, dict(zip(names, means.unbind(), strict=True)), len(kept))


def _target(
    student: Predictions, teacher: Predictions | None, stored: StoredPredictions | None, objectives: Objectives
) -> Predictions | StoredPredictions | None:
    """Returns the predictions of the teacher for the divergences; None without divergences."""
    names = ", ".join(objectives.divergences)
    if not names:
        return None
    if stored is not None:
        if names != "forward_kl" or objectives.temperature != 1:
            raise HealError(
                f"divergences: forward_kl at temperature 1 is required with stored predictions (got {names} at "
                f"{objectives.temperature:g}); run the teacher instead of storing it"
            )
        return stored
    if teacher is None:
        raise HealError(f"divergences: a teacher is required for {names} (got none)")
    check_same_vocabulary(student.head, teacher.head)
    return Predictions(teacher.hidden.detach(), teacher.head.detached())


@dataclass(frozen=True)
class _Call:
    head: Head
    labels: Tensor
    objectives: Objectives
    teacher: Predictions | StoredPredictions | None
    denominator: int
    dtype: torch.dtype  # of matrix products
    block_bytes: int
    wants_gradients: bool  # noted before: gradients are off inside an autograd function, needs_input_grad ignores that


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        call: _Call,
    ) -> tuple[Tensor, Tensor]:
        dtype = call.dtype
        targets = (hidden, weight, bias, lora_a, lora_b)
        needs = Needs(*(needed and call.wants_gradients for needed in ctx.needs_input_grad[: len(targets)]))
        with torch.autocast(hidden.device.type, enabled=False):
            lora = None if lora_a is None or lora_b is None else (lora_a.to(dtype), lora_b.to(dtype))
            head = Head(weight.to(dtype), bias, call.head.scale, call.head.softcap, lora)
            sums, gradients = _pass(hidden, head, call, needs)
        ctx.save_for_backward(
            *(None if g is None or t is None else g.to(t.dtype) for g, t in zip(gradients, targets, strict=True))
        )
        means = sums / call.denominator
        ctx.mark_non_differentiable(means)
        return (means * _weights(call.objectives, means)).sum(), means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # A factor of one is the usual case, and scaling by it would copy the head's gradient.
        is_one = bool(grad_total == 1)
        return *(g if g is None or is_one else (g * grad_total).to(g.dtype) for g in ctx.saved_tensors), None


def _pass(hidden: Tensor, head: Head, call: _Call, needs: Needs) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Returns the sums of the terms, and the gradients of the total loss in the order of `Needs`."""
    work_dtype = torch.promote_types(head.weight.dtype, torch.float32)
    sums = torch.zeros(1 + len(call.objectives.divergences), dtype=work_dtype, device=hidden.device)
    factor = head.scale / call.denominator
    gradients = HeadGradients(hidden, head, call.head.weight, needs, factor, call.block_bytes)
    num_matrices = 2 if isinstance(call.teacher, Predictions) else 1
    rows_bytes = _ROWS_BYTES.get(hidden.device.type, CHUNK_BYTES)
    for block in chunks(len(hidden), head.vocab_size, num_matrices, call.block_bytes):
        inputs = hidden[block].to(head.weight.dtype)
        logits = head.project(inputs)
        target = _Target.make(call.teacher, block)
        for rows in chunks(len(inputs), head.vocab_size, 1, rows_bytes):
            finished = head.finish(logits[rows], inputs[rows])
            values, slope = _objectives(
                finished, call.labels[block][rows], target.at(rows), call.objectives, head.softcap, any(needs)
            )
            del finished
            sums += values
            if slope is not None:
                gradients.add_bias(slope)
                logits[rows] = slope
        del target  # frees memory before products of the same size
        if any(needs):
            gradients.add(block, inputs, logits)
    return sums, gradients.tensors()


class _Target(NamedTuple):
    """The teacher's predictions for one block."""

    stored: StoredPredictions | None
    teacher: Predictions | None
    logits: Tensor | None

    @classmethod
    def make(cls, teacher: Predictions | StoredPredictions | None, block: slice) -> "_Target":
        if isinstance(teacher, StoredPredictions):
            return cls(StoredPredictions(*(part[block] for part in teacher)), None, None)
        if teacher is None:
            return cls(None, None, None)
        inputs = teacher.hidden[block].to(teacher.head.weight.dtype)
        return cls(None, Predictions(inputs, teacher.head), teacher.head.project(inputs))

    def at(self, rows: slice) -> Tensor | StoredPredictions | None:
        """Returns the teacher's logits or stored predictions of some rows of the block."""
        if self.stored is not None:
            return StoredPredictions(*(part[rows] for part in self.stored))
        if self.teacher is None or self.logits is None:
            return None
        return self.teacher.head.finish(self.logits[rows], self.teacher.hidden[rows])


def _objectives(
    logits: Tensor,
    labels: Tensor,
    target: Tensor | StoredPredictions | None,
    objectives: Objectives,
    softcap: float | None,
    wants_slope: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns the sums over some rows, and the gradient with respect to the logits before soft-cap and scale."""
    log_q = logits.log_softmax(-1)
    cap_slope = None
    if softcap is not None and wants_slope:
        cap_slope = 1 - (logits / softcap).square_()
    sums = [-log_q.gather(1, labels[:, None]).sum()]
    slope = None
    if isinstance(target, StoredPredictions):
        value, part = stored_forward_kl(log_q, target)
        sums.append(value.sum())
        slope = _weighted_sum(slope, part, objectives.divergences["forward_kl"])
        del part
    elif target is not None:
        log_p = _soften(target.to(log_q.dtype), objectives.temperature)
        softened = log_q if objectives.temperature == 1 else _soften(log_q, objectives.temperature)
        for name, weight in objectives.divergences.items():
            value, part = DIVERGENCES[name](softened, log_p)
            sums.append(value.sum() * objectives.temperature**2)
            slope = _weighted_sum(slope, part, weight * objectives.temperature)
            del part
        del log_p, softened
    if objectives.cross_entropy and wants_slope:
        part = log_q.exp_()
        part.scatter_add_(1, labels[:, None], torch.full_like(labels[:, None], -1, dtype=part.dtype))
        slope = _weighted_sum(slope, part, objectives.cross_entropy)
    if slope is not None and cap_slope is not None:
        slope.mul_(cap_slope)
    return torch.stack(sums), slope if wants_slope else None


def _weighted_sum(total: Tensor | None, part: Tensor, weight: float) -> Tensor:
    """Returns `total + weight * part`, computed in place because each pass over the logits takes time."""
    if total is not None:
        return total.add_(part, alpha=weight)
    return part if weight == 1 else part.mul_(weight)


def _soften(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _block_bytes(head: Head, num_positions: int, dtype: torch.dtype) -> int:
    """Returns the default size of a block in bytes, counted in float32."""
    largest = 4 * head.vocab_size * max(num_positions, head.weight.shape[1])
    num_bytes = max(CHUNK_BYTES, min(int(BLOCK_SHARE * largest), LARGEST_BLOCK))
    return num_bytes * 4 // max(dtype.itemsize, 2)


def _weights(objectives: Objectives, like: Tensor) -> Tensor:
    return torch.tensor(
        [objectives.cross_entropy, *objectives.divergences.values()], dtype=like.dtype, device=like.device
    )
