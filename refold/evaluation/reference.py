"""A model that others are compared with, which need not run again for each of them."""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from refold.errors import RefoldError, SourceError
from refold.evaluation.result import ModelFacts
from refold.evaluation.subject import Subject, evaluating, open_subject
from refold.modeling.load import ModelLike
from refold.scoring.head import Head, Predictions
from refold.scoring.predict import head_of, predict

REMEMBERED_BYTES = 2**30
"""Of hidden states that a reference keeps at most where the caller names no limit."""


class _Known(NamedTuple):
    """What stays of a model that is let go."""

    facts: ModelFacts
    device: torch.device
    vocab_size: int
    positions: int | None
    tokens: Mapping[str, int] | None


class Reference:
    """A model to compare others with; its hidden states of windows it has seen are kept for the next comparison.

        reference = Reference("path/to/source")
        for model in ("folded", "pruned"):
            evaluate(model, data, against=reference)

    It is loaded when a window comes that it does not remember, and let go at the end of each evaluation unless it came
    loaded. What is kept between evaluations is its head and the states, in main memory.

    Args:
        model: Folder, hub id, located source, or a loaded model, which must not change meanwhile.
        dtype: Of the weights of a model that is loaded here; None: as stored, or float32 where that is slow.
        device: Where it is loaded to; None: the best there is, or where a loaded model lies.
        remember: Bytes of hidden states to keep; what is over that is computed anew each time.
    """

    def __init__(
        self,
        model: ModelLike,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        remember: int = REMEMBERED_BYTES,
    ):
        self._given, self._dtype, self._to, self._left = model, dtype, device, remember
        self._states: dict[bytes, Tensor] = {}
        self._subject: Subject | None = None
        # Of a model that was let go: in main memory, and where it computes.
        self._head: Head | None = None
        self._head_there: Head | None = None

    @property
    def facts(self) -> ModelFacts:
        """What a result says of it."""
        return self._known.facts

    @property
    def positions(self) -> int | None:
        """How many it has; None: no limit."""
        return self._known.positions

    def predict(self, input_ids: Int64[Tensor, "B T"]) -> Predictions:
        """Returns what it predicts on some windows, where it computes; remembered if it has seen them before."""
        device = self._known.device
        key = hashlib.blake2b(repr(input_ids.shape).encode() + input_ids.cpu().numpy().tobytes()).digest()
        if key not in self._states:
            model = self._open().model
            with evaluating(model):
                states = predict(model, input_ids.to(device)).hidden
            self._keep(key, states)
            return Predictions(states, head_of(model).detached())
        return Predictions(self._states[key].to(device), self._find_head())

    def let_go(self) -> None:
        """Frees the model if it was loaded here, all but its head; it is loaded again if it is needed."""
        if self._subject is not None and not isinstance(self._given, PreTrainedModel):
            self._head = head_of(self._subject.model).detached().to(torch.device("cpu"))
            self._subject = None
        self._head_there = None

    def check(self, subject: Subject) -> None:
        """Refuses a model whose tokens mean different texts, or that cannot be compared where it lies.

        Raises:
            SourceError: The vocabularies differ.
            RefoldError: The devices do.
        """
        devices = str(subject.model.device), str(self._known.device)
        if devices[0] != devices[1]:
            raise RefoldError(f"against: both models on one device are required (got {devices[0]} and {devices[1]})")
        sizes = head_of(subject.model).vocab_size, self._known.vocab_size
        got = f"{sizes[0]} and {sizes[1]} tokens"
        if sizes[0] == sizes[1]:
            tokens = None if subject.tokenizer is None else subject.tokenizer.get_vocab()
            known = self._known.tokens
            if known is None or tokens is None or tokens == known:
                return
            got = f"{len(tokens.items() ^ known.items())} entries that only one has"
        raise SourceError(
            f"against: the vocabulary of {subject.facts.name} is required (got {got}); compare models that share a "
            f"tokenizer"
        )

    @cached_property
    def _known(self) -> _Known:
        subject = self._open()
        return _Known(
            facts=subject.facts,
            device=subject.model.device,
            vocab_size=head_of(subject.model).vocab_size,
            positions=getattr(subject.model.config, "max_position_embeddings", None),
            tokens=None if subject.tokenizer is None else subject.tokenizer.get_vocab(),
        )

    def _find_head(self) -> Head:
        if self._subject is not None:
            return head_of(self._subject.model).detached()
        if self._head_there is None:
            assert self._head is not None
            self._head_there = self._head.to(self._known.device)
        return self._head_there

    def _open(self) -> Subject:
        if self._subject is None:
            loaded = isinstance(self._given, PreTrainedModel)
            options = {} if loaded else {"dtype": self._dtype, "device": self._to}
            self._subject = open_subject(self._given, **options)
        return self._subject

    def _keep(self, key: bytes, states: Float[Tensor, "B T D"]) -> None:
        size = states.numel() * states.element_size()
        if size <= self._left:
            self._left -= size
            self._states[key] = states.cpu()
