"""Cross-entropy and distillation losses that hold the logits of a few tokens at a time.

The gradient of a token's loss depends on that token's logits only, so the forward pass computes, block by block, the
loss and at once the gradients of hidden states and head; the backward pass scales them. Beyond one block's logits this
needs one gradient of the hidden states and one of the head, which training needs anyway.

There are two sizes. A block is what matrices are multiplied in: each passes over the whole head and its gradient, so it
must not be small. Its logits stay in the dtype of the products, and slopes take their place. Within it, a few rows at a
time are worked on in float32, few enough for a CPU's caches.
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
"""A block's logits, of student and teacher together: so large a share of one copy of all logits, or of the head's
gradient where that is larger, at most so many bytes, but at least `CHUNK_BYTES`."""
_ROWS_BYTES = {"cpu": 4 * 2**20}
"""Float32 logits worked on at a time, by kind of device; elsewhere `CHUNK_BYTES`."""


@dataclass(frozen=True)
class Objectives:
    """What a loss is made of: `cross_entropy * CE + sum of divergences[name] * temperature^2 * D_name`.

    Attributes:
        cross_entropy: weight of the cross-entropy with the labels, always at temperature 1.
        divergences: weights by name, see `DIVERGENCES`.
        temperature: both models' logits are divided by it within divergences, whose value is multiplied by its square
            so that gradients keep their size (arXiv 1503.02531, section 2).

    Raises:
        HealError: an unknown divergence, a negative weight, or a temperature that is not positive.
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
    """A loss and its parts.

    Attributes:
        total: what to call `backward` on; float32 (float64 for float64 inputs).
        means: by name (`cross_entropy` and each divergence), without weights and gradients: sums over the scored tokens
            divided by the same denominator as `total`.
        num_tokens: scored tokens here.
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
    """Computes the mean loss over the positions whose label is not -100, and readies its gradients.

    Gradients reach `student.hidden`, `student.head.weight`, `.bias` and `.lora` where those require them; a tied
    embedding gets its share like any other use of the tensor. There are no gradients of gradients.

    Args:
        student: hidden states `[*M, D]` and head.
        labels: the id each position predicts (already shifted), -100: not scored, in the divergences neither.
        objectives: weights; None: cross-entropy alone.
        teacher: hidden states `[*M, Dt]` and head of the teacher; gets no gradient. Divergences need it, or `stored`.
        stored: the teacher's likeliest tokens instead, for the forward KL at temperature 1 over them and the rest.
        num_tokens: denominator of the means, for gradient accumulation (the tokens of all micro-batches); None: the
            scored tokens here. Better than scaling the loss, which costs a copy of the head's gradient.
        chunk_bytes: logits of one block, counted in float32; None: see `BLOCK_SHARE`.

    Raises:
        HealError: divergences without a teacher, or with a stored one that cannot give them.
        SourceError: the vocabularies differ.
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
    """What divergences compare with; None without divergences."""
    names = ", ".join(objectives.divergences)
    if not names:
        return None
    if stored is not None:
        if names != "forward_kl" or objectives.temperature != 1:
            raise HealError(
                f"divergences: forward_kl at temperature 1 is required with stored predictions (got {names} at "
                f"{objectives.temperature:g}); let the teacher run along"
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
    wants_gradients: bool  # inside an autograd function gradients are off, and needs_input_grad ignores no_grad


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
        # A factor of one, the usual case, must not cost a second copy of the head's gradient.
        is_one = bool(grad_total == 1)
        return *(g if g is None or is_one else (g * grad_total).to(g.dtype) for g in ctx.saved_tensors), None


def _pass(hidden: Tensor, head: Head, call: _Call, needs: Needs) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Sums of the objectives, and the gradients of the total loss in the order of `Needs`."""
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
        del target  # before products of the same size are made
        if any(needs):
            gradients.add(block, inputs, logits)
    return sums, gradients.tensors()


class _Target(NamedTuple):
    """What a block is compared with."""

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
        """The teacher's logits, or what is stored of them, at some rows of the block."""
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
    """Sums over some rows, and the gradient by the logits before soft-cap and scale."""
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
    """Adds in place; a chunk's logits are large enough for each pass over them to cost."""
    if total is not None:
        return total.add_(part, alpha=weight)
    return part if weight == 1 else part.mul_(weight)


def _soften(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _block_bytes(head: Head, num_positions: int, dtype: torch.dtype) -> int:
    """Default size of a block, counted in float32."""
    largest = 4 * head.vocab_size * max(num_positions, head.weight.shape[1])
    num_bytes = max(CHUNK_BYTES, min(int(BLOCK_SHARE * largest), LARGEST_BLOCK))
    return num_bytes * 4 // max(dtype.itemsize, 2)


def _weights(objectives: Objectives, like: Tensor) -> Tensor:
    return torch.tensor(
        [objectives.cross_entropy, *objectives.divergences.values()], dtype=like.dtype, device=like.device
    )
