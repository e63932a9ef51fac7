"""Loss on clean text after noisy text: how much of the context a model still uses when the context has faults."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from transformers import PreTrainedTokenizerBase

from refold.data.encoder import document_start_token
from refold.data.packing import IGNORED
from refold.data.tokens import require_known_tokens
from refold.evaluation.document_sums import DocumentFloats, ratio_error
from refold.evaluation.settings import BATCH_TOKENS
from refold.evaluation.subject import evaluating, require_tokenizer
from refold.scorecard.job import ScoreJob, SectionNotRun
from refold.scorecard.noisy_text import NOISES, make_noise, split_words
from refold.scorecard.openings import draw_texts, fitting_opening
from refold.scorecard.record import NoiseScore
from refold.scoring.agreement import token_scores
from refold.scoring.predict import predict

NO_CONTEXT = "no first half"
_MOST_CHARACTERS = 16
"""Characters to encode for each token that is wanted; well above the mean of any language."""


class HalvedText(NamedTuple):
    """A document's opening in two halves.

    Attributes:
        first: The first half, which gets the noise.
        second: Tokens of the second half.
        num_bytes: UTF-8 bytes of the second half.
    """

    first: str
    second: Int64[np.ndarray, "_"]
    num_bytes: int


def measure_noise(job: ScoreJob) -> tuple[NoiseScore, ...]:
    """Measures the loss on the clean second half of documents' openings, after a first half with noise.

    The loss on noisy text itself says little, because noise cannot be predicted. So the noise is in the first half, and
    the same tokens of the second half are scored each time: after the clean first half, after each kind and share of
    noise, and without the first half, which shows the worth of all of it. A model that never reads far back loses
    nothing by noise, so read the differences beside the one of `no first half`.

    Both halves are encoded by themselves. Noise needs more tokens; a first half that does not fit the opening and half
    of it again loses its first ones.

    Raises:
        SectionNotRun: There is no text, or no document is long enough.
    """
    halves, words = _read_halves(job)
    start = document_start_token(require_tokenizer(job.subject))
    seed, sizes = job.settings.seed, np.array([each.num_bytes for each in halves])
    kinds = [(kind, share) for kind in NOISES for share in job.settings.amounts.noise_shares]
    # Without a start token nothing would stand before the first token of the second half.
    kinds += [] if start is None else [(NO_CONTEXT, 1.0)]
    scores = list[NoiseScore]()
    with job.show.progress(f"{job.subject.facts.name}: noise", "texts") as report:
        clean = _score(job, halves, [each.first for each in halves])
        for number, (kind, share) in enumerate(kinds):
            firsts = [
                "" if kind == NO_CONTEXT else make_noise(kind, each.first, share, (seed, index), words)
                for index, each in enumerate(halves)
            ]
            found = _score(job, halves, firsts)
            more = (found - clean) / math.log(2)
            scores.append(
                NoiseScore(
                    kind=kind,
                    share=share,
                    bits_per_byte=float(found.sum()) / math.log(2) / int(sizes.sum()),
                    difference=float(more.sum()) / int(sizes.sum()),
                    difference_error=ratio_error(more, sizes),
                    num_documents=len(halves),
                )
            )
            report(number + 1, len(kinds))
    return tuple(scores)


def halve(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> HalvedText | None:
    """Returns the opening of a text in two halves of about as many tokens, cut between words.

    Args:
        text: The text.
        tokenizer: The tokenizer.
        tokens: Tokens of both halves together.

    Returns:
        None if the text is too short, or has no space before a cut.
    """
    middle = _cut(text, tokenizer, tokens // 2)
    end = 0 if middle == 0 else _cut(text[middle:], tokenizer, tokens // 2)
    if end == 0:
        return None
    second = text[middle : middle + end]
    return HalvedText(text[:middle], _encode(tokenizer, second), len(second.encode()))


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> int:
    """Returns the place of the last space in the first tokens of a text; 0 if there are too few tokens or no space."""
    ids = _encode(tokenizer, text[: _MOST_CHARACTERS * tokens])[:tokens]
    if len(ids) < tokens:
        return 0
    piece: Any = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    return max(text.rfind(space, 1, len(piece)) for space in (" ", "\n")) if len(piece) > 1 else 0


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Int64[np.ndarray, "_"]:
    return np.array(tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=np.int64)


def _read_halves(job: ScoreJob) -> tuple[list[HalvedText], list[str]]:
    """Returns the openings, and all their words."""
    amounts, tokenizer = job.settings.amounts, require_tokenizer(job.subject)
    tokens = fitting_opening(job, amounts.opening)
    found = list[HalvedText]()
    for text in draw_texts(job):
        halved = halve(text, tokenizer, tokens)
        if halved is not None:
            found.append(halved)
        if len(found) == amounts.documents:
            break
    if not found:
        raise SectionNotRun(
            f"text with a document of at least {tokens} tokens is required (got none); give longer ones"
        )
    require_known_tokens("data", np.concatenate([each.second for each in found]), job.subject.num_embeddings)
    return found, [word for each in found for word in split_words(each.first)]


@torch.inference_mode()
def _score(job: ScoreJob, halves: Sequence[HalvedText], firsts: Sequence[str]) -> DocumentFloats:
    """Returns the negative log-likelihood of each second half after the first half that is given for it, nats."""
    tokenizer, model = require_tokenizer(job.subject), job.subject.model
    start = document_start_token(tokenizer)
    opening = [] if start is None else [start]
    most = fitting_opening(job, job.settings.amounts.opening * 3 // 2)
    rows: list[np.ndarray] = []
    for first, halved in zip(firsts, halves, strict=True):
        room = most - len(opening) - len(halved.second)
        before = _encode(tokenizer, first)
        rows.append(np.concatenate((opening, before[max(0, len(before) - room) :], halved.second)).astype(np.int64))
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    count, nll = max(1, BATCH_TOKENS // len(rows[order[0]])), np.zeros(len(rows))
    with evaluating(model):
        for place in range(0, len(order), count):
            some = order[place : place + count]
            longest = len(rows[some[0]])
            # Padding is on the right, where a causal model never reads it from a real token.
            tokens = torch.zeros(len(some), longest, dtype=torch.int64)
            is_scored = torch.zeros(len(some), longest, dtype=torch.bool)
            for row, index in enumerate(some):
                size = len(rows[index])
                tokens[row, :size] = torch.from_numpy(rows[index])
                is_scored[row, size - len(halves[index].second) : size] = True
            tokens, is_scored = tokens.to(model.device), is_scored.to(model.device)
            labels = torch.where(is_scored, tokens, IGNORED)[:, 1:].contiguous()
            found = token_scores(predict(model, tokens[:, :-1]), labels)
            nll[some] = found.nll.double().sum(-1).cpu().numpy()
    return nll
