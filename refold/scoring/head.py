"""The head that maps hidden states to logits, and predictions as hidden states with a head."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from refold.errors import SourceError

CHUNK_BYTES = 64 * 2**20
"""Default size of the float32 logits of a chunk, model and reference together; temporary copies take more."""


@dataclass(frozen=True)
class Head:
    """The head: logits are `softcap * tanh(z / softcap)` with `z = scale * (hidden weight^T + bias)`.

    Without a soft-cap the logits are z. With a LoRA the weight is `weight + b a`; this sum is never formed.

    Attributes:
        weight: The weight; possibly the tensor of the embedding (tied).
        bias: The bias, or None.
        scale: Factor of the logits (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        softcap: Gemma 2's `final_logit_softcapping`, or None.
        lora: LoRA `(a, b)` of an early exit, or None.
    """

    weight: Float[Tensor, "N D"]
    bias: Float[Tensor, "N"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    lora: tuple[Float[Tensor, "R D"], Float[Tensor, "N R"]] | None = None

    @property
    def vocab_size(self) -> int:
        """Size N of the vocabulary."""
        return self.weight.shape[0]

    def logits(self, hidden: Float[Tensor, "*M D"]) -> Float[Tensor, "*M N"]:
        """Returns the logits in float32, or in float64 for a float64 weight.

        Matrix products run in the weight's dtype, or in the dtype of autocast if it is on. Other steps run in float32.
        """
        return self.finish(self.project(hidden), hidden)

    def project(self, hidden: Float[Tensor, "*M D"]) -> Float[Tensor, "*M N"]:
        """Returns the product of hidden states and weight alone, in the dtype of matrix products."""
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(self.weight.dtype)
        return F.linear(hidden, self.weight)

    def finish(self, product: Float[Tensor, "*M N"], hidden: Float[Tensor, "*M D"]) -> Float[Tensor, "*M N"]:
        """Returns the logits for a product of `project`, which stays unchanged."""
        lora = self.lora
        if lora is not None and not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(self.weight.dtype)
            lora = (lora[0].to(hidden.dtype), lora[1].to(hidden.dtype))
        low_rank = None if lora is None else F.linear(F.linear(hidden, lora[0]), lora[1])
        with torch.autocast(hidden.device.type, enabled=False):
            # Half precision has 8 or 11 bits, too few for sums over the vocabulary.
            logits = product.to(torch.promote_types(product.dtype, torch.float32))
            if low_rank is not None:
                logits = logits + low_rank
            if self.bias is not None:
                logits = logits + self.bias
            if self.scale != 1.0:
                logits = logits * self.scale
            if self.softcap is not None:
                logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def detached(self) -> "Head":
        """Returns the same head without gradients."""
        bias = None if self.bias is None else self.bias.detach()
        lora = None if self.lora is None else (self.lora[0].detach(), self.lora[1].detach())
        return Head(self.weight.detach(), bias, self.scale, self.softcap, lora)

    def to(self, device: torch.device) -> "Head":
        """Returns the same head on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        lora = None if self.lora is None else (self.lora[0].to(device), self.lora[1].to(device))
        return Head(self.weight.to(device), bias, self.scale, self.softcap, lora)


class Predictions(NamedTuple):
    """Next-token predictions as hidden states and head, from which logits can be computed.

    Attributes:
        hidden: Last hidden states, after the final norm.
        head: The head.
    """

    hidden: Float[Tensor, "*M D"]
    head: Head

    def flat(self, index: Int64[Tensor, "K"] | None) -> "Predictions":
        """Returns the positions of a flat index, or all positions, as `[K, D]`."""
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])
        return Predictions(hidden if index is None else hidden.index_select(0, index), self.head)


def scored_positions(labels: Int64[Tensor, "*M"]) -> Int64[Tensor, "K"] | None:
    """Returns the flat index of the positions whose label is not -100, or None if that is every position."""
    kept = labels.reshape(-1) != -100
    return None if bool(kept.all()) else kept.nonzero().squeeze(-1)


def chunks(num_positions: int, vocab_size: int, num_matrices: int, chunk_bytes: int) -> Iterator[slice]:
    """Yields ranges of at least one position for which `num_matrices` float32 logits fit in `chunk_bytes`."""
    length = max(1, chunk_bytes // (4 * vocab_size * num_matrices))
    if length > 16:
        length -= length % 16  # matrix kernels work in tiles
    for start in range(0, num_positions, length):
        yield slice(start, min(start + length, num_positions))


def check_same_vocabulary(model: Head, reference: Head) -> None:
    """Checks that the logits of two heads can be compared.

    Raises:
        SourceError: The vocabularies differ in size.
    """
    if model.vocab_size != reference.vocab_size:
        raise SourceError(
            f"scoring: model and reference must share one vocabulary (got {model.vocab_size} and "
            f"{reference.vocab_size} tokens); compare models that share a tokenizer"
        )
