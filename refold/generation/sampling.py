"""Settings of the choice and number of new tokens."""

from dataclasses import dataclass

from refold.errors import RefoldError

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class Sampling:
    """Settings of one generation.

    Attributes:
        max_new_tokens: Maximal number of new tokens; None: 128, or the number that fits into the model's positions.
        temperature: 0 takes the likeliest token (greedy); otherwise logits are divided by it and a token is drawn.
        top_p: Draw from the likeliest tokens whose probabilities sum to this.
        top_k: Draw from this number of likeliest tokens; 0: from all.
        seed: Seed of the draws.
        exit_depth: Number of depths of a folded model to run; None: all.

    Raises:
        RefoldError: A setting is out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    exit_depth: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise RefoldError(f"max_new_tokens: at least 1 is required (got {self.max_new_tokens})")
        if not 0 <= self.temperature < float("inf"):
            raise RefoldError(f"temperature: 0 (greedy) or more is required (got {self.temperature})")
        if not 0 < self.top_p <= 1:
            raise RefoldError(f"top_p: must be above 0 and at most 1 (got {self.top_p})")
        if self.top_k < 0:
            raise RefoldError(f"top_k: 0 (all tokens) or more is required (got {self.top_k})")
        if not 0 <= self.seed < 2**63:
            raise RefoldError(f"seed: 0 to 2^63 - 1 is required (got {self.seed})")
