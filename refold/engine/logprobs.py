"""Log-probabilities of tokens under the model, and those of whole prompts, in pieces."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from refold.engine.buffer import Buffer
from refold.engine.results import PromptLogprob, TokenLogprob
from refold.engine.sequence import Span
from refold.modeling.model import RefoldForCausalLM
from refold.scoring.head import chunks

_PIECE_BYTES = 32 * 2**20
"""Float32 logits of the tokens of a prompt that are in memory at once."""


def token_logprobs(
    logits: Float[Tensor, "R N"], tokens: Int64[Tensor, " R"], counts: Sequence[int], buffer: Buffer
) -> list[PromptLogprob]:
    """Returns the log-probability of a token of each row, and the likeliest tokens.

    Args:
        logits: Logits of the model, before any setting.
        tokens: The token of each row.
        counts: Number of likeliest tokens that each row wants.
        buffer: Memory for one float32 copy of the logits.
    """
    wide = logits.float()
    largest = wide.amax(dim=-1, keepdim=True)
    ratios = torch.sub(wide, largest, out=buffer.take(*wide.shape)).exp_()
    totals = largest + ratios.sum(dim=-1, keepdim=True).log()
    own = (wide.gather(1, tokens[:, None]) - totals)[:, 0].tolist()
    values, ids = wide.topk(min(max(counts), wide.shape[1]), dim=-1)
    likeliest = zip((values - totals).tolist(), ids.tolist(), strict=True)
    return [
        PromptLogprob(token, logprob, tuple(map(TokenLogprob, row_ids[:count], row_values[:count])))
        for token, logprob, count, (row_values, row_ids) in zip(tokens.tolist(), own, counts, likeliest, strict=True)
    ]


class PromptScorer:
    """Computes the log-probabilities of prompts while they are read.

    Args:
        model: The model.
    """

    def __init__(self, model: RefoldForCausalLM):
        self._model, self._buffer = model, Buffer(model.device)

    def score(self, span: Span, streams: Float[Tensor, "T D"], depth: int) -> bool:
        """Adds the log-probabilities of the tokens behind those of a span to its request.

        Args:
            span: A span of the prompt that has run all its segments.
            streams: The residual stream of all its tokens.
            depth: Number of depths they have run.

        Returns:
            Whether all of them are finite.
        """
        request = span.sequence.request
        assert request.sampling.prompt_logprobs is not None
        # Tokens that ran before their memory was given up are known already.
        known = len(request.prompt_logprobs) - span.start
        last = min(span.length, len(request.prompt_ids) - 1 - span.start)
        streams, first = streams[known:last], span.start + known + 1
        for rows in chunks(len(streams), self._model.config.vocab_size, 2, _PIECE_BYTES):
            logits = self._model.logits_after(depth, streams[rows])
            targets = request.prompt_ids[first + rows.start : first + rows.stop]
            counts = [request.sampling.prompt_logprobs] * len(targets)
            tokens = torch.tensor(targets, device=logits.device)
            found = token_logprobs(logits, tokens, counts, self._buffer)
            if not all(each.logprob > -torch.inf for each in found):
                return False
            request.prompt_logprobs += found
        return True
