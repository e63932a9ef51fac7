"""Models that recall by construction, and jobs of scorecards."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from refold.data.corpus import Data
from refold.evaluation.result import ModelFacts
from refold.evaluation.settings import EvaluationSettings
from refold.evaluation.subject import Subject, open_subject
from refold.modeling.load import load_tokenizer
from refold.scorecard.amounts import ScoreAmounts
from refold.scorecard.job import ScoreJob
from refold.scorecard.settings import ScoreSettings

WIDTH = 256


class LookingBack(PreTrainedModel):
    """Predicts the token that followed the longest of the last words before, up to four of them.

    It has no weights but a head of random directions: its hidden state is 20 times the direction of the next token.
    """

    config_class = LlamaConfig
    base_model_prefix = ""

    def __init__(self, vocab_size: int, positions: int = 4096, reach: int = 10**6):
        super().__init__(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=positions))
        self.head = nn.Linear(WIDTH, vocab_size, bias=False)
        self.embedding = nn.Embedding(vocab_size, 1)
        self.reach = reach
        rows = torch.randn(vocab_size, WIDTH, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            self.head.weight.copy_(nn.functional.normalize(rows, dim=-1))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        hidden = torch.zeros(*input_ids.shape, WIDTH)
        for row, ids in enumerate(input_ids.tolist()):
            # The tokens that followed each run of up to four tokens, with the latest place.
            followed: dict[tuple[int, ...], tuple[int, int]] = {}
            for place in range(len(ids)):
                for size in range(4, 0, -1):
                    next_token, at = followed.get(tuple(ids[max(0, place - size + 1) : place + 1]), (0, -1))
                    if at >= 0 and place - at <= self.reach:
                        hidden[row, place] = 20 * self.head.weight[next_token]
                        break
                if place + 1 < len(ids):
                    for size in range(1, 5):
                        if place + 1 >= size:
                            followed[tuple(ids[place - size + 1 : place + 1])] = ids[place + 1], place
        return SimpleNamespace(last_hidden_state=hidden)


@pytest.fixture(scope="session")
def make_looking_back() -> Callable[..., LookingBack]:
    """Makes models that look for the same words before; `reach` limits how far back they look, in tokens."""
    return LookingBack


@pytest.fixture(scope="session")
def make_job() -> Callable[..., ScoreJob]:
    """Makes a job of a folder or of a loaded model with a tokenizer; keywords are amounts."""

    def make(model: Any, data: Data | None = None, tokenizer: Any = None, seed: int = 0, **amounts: Any) -> ScoreJob:
        settings = ScoreSettings(text=EvaluationSettings(), seed=seed, amounts=ScoreAmounts(**amounts))
        if isinstance(model, LookingBack):
            facts = ModelFacts(name="looks back", model_type="toy", parameters=1, weight_bytes=4, dtype="float32")
            subject = Subject(model, tokenizer, facts)
        else:
            subject = open_subject(model, tokenizer)
        return ScoreJob(model, subject, data, None, settings)

    return make


@pytest.fixture(scope="session")
def shipped_tokenizer() -> Any:
    """The tokenizer of the shipped model: byte-level, with whole words."""
    import refold

    return load_tokenizer(Path(refold.__file__).parent / "shipped" / "stdlib-5m")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents in which nothing comes back but common words."""
    words = ["the", "sea", "was", "calm", "that", "night", "and", "moon", "lay", "on", "it", "then", "ships", "went"]
    places = range(90)
    return [" ".join(words[(3 * at + at * at // 7 + number) % 14] for at in places) for number in range(8)]
