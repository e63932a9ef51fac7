"""A reference model that several models are compared with and that runs only once."""

import hashlib
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refold.errors import RefoldError, SourceError
from refold.evaluation.result import ModelFacts
from refold.evaluation.subject import Subject, evaluating, open_subject
from refold.modeling.load import ModelLike
from refold.scoring.head import Head, Predictions
from refold.scoring.predict import head_of, predict

REMEMBERED_BYTES = 2**30
"""Default limit of the hidden states that a reference keeps, in bytes."""


class _ReferenceFacts(NamedTuple):
    """Facts about the reference model that are still needed after the model is freed."""

    facts: ModelFacts
    device: torch.device
    vocab_size: int
    positions: int | None
    tokenizer: PreTrainedTokenizerBase | None


class Reference:
    """A model to compare other models with; it keeps its hidden states of windows for the next comparison.

        reference = Reference("path/to/source")
        for model in ("folded", "pruned"):
            evaluate(model, data, against=reference)

    The model is loaded when hidden states of a window are missing, and freed at the end of each evaluation unless the
    caller loaded it. Head and hidden states are kept between evaluations, in main memory.

    Args:
        model: Folder, hub id, located source, or a loaded model, which must not change between evaluations.
        dtype: Dtype of the weights when the reference loads them; None: the stored dtype, or float32 if that is slow.
        device: Device to load the model to; None: the best one of the machine, or the device of a loaded model.
        remember: Limit of hidden states to keep, in bytes; states beyond it are computed again each time.
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
        # The head of a freed model: in main memory, and on the device that computes.
        self._head: Head | None = None
        self._head_there: Head | None = None

    @property
    def given(self) -> ModelLike:
        """The model as the caller gave it."""
        return self._given

    @property
    def facts(self) -> ModelFacts:
        """Facts about the model for results."""
        return self._known.facts

    @property
    def positions(self) -> int | None:
        """Number of positions of the model; None: no limit."""
        return self._known.positions

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self._known.device

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self._known.vocab_size

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer; None if it has none."""
        return self._known.tokenizer

    def predict(self, input_ids: Int64[Tensor, "B T"]) -> Predictions:
        """Returns the model's predictions for windows, on its device; known windows do not run again."""
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
        """Frees the model, except for its head, unless the caller loaded it."""
        if self._subject is not None and not isinstance(self._given, PreTrainedModel):
            self._head = head_of(self._subject.model).detached().to(torch.device("cpu"))
            self._subject = None
        self._head_there = None

    def check(self, subject: Subject) -> None:
        """Checks that a model has the same vocabulary and device.

        Raises:
            SourceError: The vocabularies differ.
            RefoldError: The devices differ.
        """
        self.check_device(subject)
        sizes = head_of(subject.model).vocab_size, self._known.vocab_size
        got = f"{sizes[0]} and {sizes[1]} tokens"
        if sizes[0] == sizes[1]:
            tokens = None if subject.tokenizer is None else subject.tokenizer.get_vocab()
            known = None if self.tokenizer is None else self.tokenizer.get_vocab()
            if known is None or tokens is None or tokens == known:
                return
            got = f"{len(tokens.items() ^ known.items())} entries that only one has"
        raise SourceError(
            f"against: the vocabulary of {subject.facts.name} is required (got {got}); compare models that share a "
            f"tokenizer, or evaluate each by itself and compare bits per byte and tasks with `refold compare`"
        )

    def check_device(self, subject: Subject) -> None:
        """Checks that a model has the same device.

        Raises:
            RefoldError: The devices differ.
        """
        devices = str(subject.model.device), str(self._known.device)
        if devices[0] != devices[1]:
            raise RefoldError(f"against: both models on one device are required (got {devices[0]} and {devices[1]})")

    @cached_property
    def _known(self) -> _ReferenceFacts:
        subject = self._open()
        return _ReferenceFacts(
            facts=subject.facts,
            device=subject.model.device,
            vocab_size=head_of(subject.model).vocab_size,
            positions=subject.positions,
            tokenizer=subject.tokenizer,
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
