"""Settings of an evaluation: windows, amount of text, and the form in which models are loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from refold.errors import DataError

DEFAULT_CONTEXT = 1024
"""Tokens in a window, if the settings set no context and the models have at least as many positions."""
BATCH_TOKENS = 4096
"""Tokens in a batch of windows, if the settings set no batch size."""


class WindowSizes(NamedTuple):
    """Sizes of the windows of one evaluation.

    Attributes:
        context: Tokens in a window.
        stride: Tokens scored by each window of a document after its first.
        batch_size: Windows in a batch.
    """

    context: int
    stride: int
    batch_size: int


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of one evaluation.

    Attributes:
        context: Tokens in a window; None: 1,024, or as many positions as the models have if that is less.
        stride: Tokens scored by each window of a document after its first; None: half the context.
        max_tokens: Tokens of the data to read at most, start tokens included; several kinds of text share them evenly.
            None: all tokens.
        batch_size: Windows in a batch; None: as many as 4,096 tokens hold.
        dtype: Dtype of the weights of models that are loaded for the evaluation; None: the stored dtype, or float32
            where that is slow.
        device: Device that models are loaded to; None: the best one of the machine, or the device of a loaded model.
        quantise: `int8` or `int4`: round the weights of the evaluated model's linears to integers, see
            `refold.blueprint.quantisation`; not for a loaded model. The model compared with is not rounded.
    """

    context: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    batch_size: int | None = None
    dtype: str | torch.dtype | None = None
    device: str | torch.device | None = None
    quantise: str | None = None

    def window_sizes(self, positions: Mapping[str, int | None]) -> WindowSizes:
        """Returns the sizes of windows, with defaults where a size is not set.

        Args:
            positions: Number of positions of each model, by the model's name; None: no limit.

        Raises:
            DataError: A size is below 1, or the context exceeds a model's positions.
        """
        known = {name: int(limit) for name, limit in positions.items() if limit is not None}
        context = min([DEFAULT_CONTEXT, *known.values()]) if self.context is None else self.context
        if context < 1:
            raise DataError(f"context: at least 1 token is required (got {context})")
        for name, limit in known.items():
            if context > limit:
                raise DataError(f"context: must be at most {limit}, the positions of {name} (got {context})")
        batch_size = max(1, BATCH_TOKENS // context) if self.batch_size is None else self.batch_size
        if batch_size < 1:
            raise DataError(f"batch_size: at least 1 window is required (got {batch_size})")
        return WindowSizes(context, max(1, context // 2) if self.stride is None else self.stride, batch_size)
