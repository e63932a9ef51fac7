"""The class by which lm-eval runs a model of refold: `lm_eval --model refold --model_args pretrained=FOLDER`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models import huggingface
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refold.errors import RefoldError
from refold.evaluation.subject import open_subject, require_tokenizer
from refold.progress import Report
from refold.scorecard.job import SectionNotRun
from refold.scorecard.tasks.continuations import BATCH_TOKENS, AnswerTokens, score_continuations
from refold.suggest import did_you_mean

logger = logging.getLogger("refold")

HuggingFaceModel: Any = huggingface.HFLM
"""lm-eval's `hf`. Its decorator hides its type."""
BATCH_SIZE = 8
"""Texts of a batch of generation and of rolling windows."""
ARGUMENTS = (
    "pretrained",
    "tokenizer",
    "dtype",
    "device",
    "batch_tokens",
    "batch_size",
    "max_length",
    "add_bos_token",
    "prefix_token_id",
)


class RefoldLM(HuggingFaceModel):
    """A model that refold loads: folded, quantised, hybrid, or a source.

    Tokens, start tokens, windows and generation are those of lm-eval's `hf`. Log-likelihoods of continuations are
    computed by `score_continuations`.

    Args:
        pretrained: Folder, hub id, GGUF file, or a loaded model.
        tokenizer: Tokenizer, or its folder; None: the model's own.
        dtype: As for `load_model`; `auto`: the stored dtype.
        device: As for `load_model`. A CUDA device that is not there becomes the machine's best device, as with `hf`.
        batch_tokens: Tokens of a batch of continuations.
        batch_size: Texts of a batch of generation and of rolling windows.
        max_length: Most tokens of a text; None: the model's positions.
        add_bos_token: Whether to begin a text with the start token; None: as the tokenizer does.
        prefix_token_id: Token before a continuation without context; None: the start token, or the end token.
        progress: Gets scored and all continuations; None: a bar of lm-eval's kind.

    Raises:
        RefoldError: An argument is unknown, or the model or its tokenizer cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str | Path | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        batch_tokens: int = BATCH_TOKENS,
        progress: Report | None = None,
        **options: Any,
    ) -> None:
        for name in options.keys() - {"max_batch_size", "trust_remote_code", *ARGUMENTS}:
            hint = did_you_mean(name, ARGUMENTS)
            raise RefoldError(f"model_args: must be of {', '.join(ARGUMENTS)} (got '{name}'){hint}")
        loaded = isinstance(pretrained, PreTrainedModel)
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            # lm-eval's command line asks for cuda:0 on every machine.
            logger.warning(f"device: {device} is not on this machine; the best device of the machine is used")
            device = None
        subject = open_subject(
            pretrained,
            None if isinstance(tokenizer, str) else tokenizer,
            dtype=None if loaded else dtype,
            device=None if loaded else device,
        )
        self._batch_tokens = batch_tokens
        self._progress = progress
        super().__init__(
            subject.model,
            backend="causal",
            tokenizer=tokenizer if isinstance(tokenizer, str) else require_tokenizer(subject),
            batch_size=options.get("batch_size") or BATCH_SIZE,
            max_length=options.get("max_length"),
            add_bos_token=options.get("add_bos_token"),
            prefix_token_id=options.get("prefix_token_id"),
        )
        self.pretrained = subject.facts.name

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Returns log-likelihood and greediness of continuations, from tokens of contexts and continuations."""
        wanted = []
        for _, context, continuation in requests:
            assert context
            if not 0 < len(continuation) <= self.max_length:
                raise SectionNotRun(
                    f"answers of 1 to {self.max_length} tokens are required, the positions of the model (got one of "
                    f"{len(continuation)}); take other tasks"
                )
            # Too long texts lose their first tokens, as with `hf`.
            wanted.append(AnswerTokens((context + continuation)[-(self.max_length + 1) :], len(continuation)))
        if self._progress is not None:
            scores = score_continuations(self.model, wanted, batch_tokens=self._batch_tokens, progress=self._progress)
        else:
            with tqdm(total=len(wanted), desc="Scoring continuations", disable=disable_tqdm) as bar:
                scores = score_continuations(
                    self.model,
                    wanted,
                    batch_tokens=self._batch_tokens,
                    progress=lambda done, total: _show(bar, done),
                )
        answers = [(score.log_likelihood, score.is_greedy) for score in scores]
        for (request, _, _), answer in zip(requests, answers, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """Returns facts about the model for lm-eval's results, without asking the hub."""
        return {"model_num_parameters": self.model.num_parameters(), "model_dtype": str(self.model.dtype)}


def _show(bar: Any, done: int) -> None:
    bar.update(done - bar.n)


register_model("refold")(RefoldLM)
