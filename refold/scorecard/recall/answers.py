"""Scoring of recall by teacher forcing: at every answer token the model's likeliest token is compared with it."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float
from transformers import PreTrainedModel

from refold.data.packing import IGNORED
from refold.evaluation.settings import BATCH_TOKENS
from refold.evaluation.subject import evaluating
from refold.scorecard.recall.item import RecallItem
from refold.scoring.agreement import token_scores
from refold.scoring.predict import predict


class AnswerShares(NamedTuple):
    """Scores of items.

    Attributes:
        right: Share of the answer tokens of each item that are the model's likeliest.
        exact: Whether all of them are, 0 or 1: greedy decoding would write the answer as it is.
        gain: Nats by which an answer token is likelier than at its earlier mention, as a mean over the answer tokens
            of each item; None where there are no mentions.
    """

    right: Float[np.ndarray, "num_items"]
    exact: Float[np.ndarray, "num_items"]
    gain: Float[np.ndarray, "num_items"] | None


@torch.inference_mode()
def score_answers(model: PreTrainedModel, items: Sequence[RecallItem]) -> AnswerShares:
    """Scores items of one length.

    Every answer token is predicted from the right tokens before it, so nothing is generated.

    Args:
        model: A folded model or a source.
        items: The items; each has an answer.
    """
    has_mentions = items[0].is_mention is not None
    rows = max(1, BATCH_TOKENS // len(items[0].tokens))
    right: list[float] = []
    gains: list[float] = []
    with evaluating(model):
        for first in range(0, len(items), rows):
            some = items[first : first + rows]
            tokens = torch.from_numpy(np.stack([item.tokens for item in some]))
            is_answer = torch.from_numpy(np.stack([item.is_answer for item in some]))[:, 1:]
            is_mention = torch.zeros_like(is_answer)
            if has_mentions:
                is_mention = torch.from_numpy(np.stack([cast("np.ndarray", item.is_mention) for item in some]))[:, 1:]
            labels = torch.where(is_answer | is_mention, tokens[:, 1:], IGNORED)
            found = token_scores(predict(model, tokens[:, :-1].to(model.device)), labels.to(model.device))
            counts = is_answer.sum(-1)
            right += ((found.is_correct.cpu() & is_answer).sum(-1) / counts.double()).tolist()
            nll = found.nll.cpu().double()
            gains += (((nll * is_mention).sum(-1) - (nll * is_answer).sum(-1)) / counts).tolist()
    shares = np.array(right)
    return AnswerShares(shares, (shares == 1.0).astype(np.float64), np.array(gains) if has_mentions else None)
