"""Shapes of choices and chunks: the parts that both endpoints share."""

import hashlib
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from refold.serve.asking import Asking, ChoicePart
from refold.serve.prompting import Prompter
from refold.serve.served import ServedModel
from refold.version import __version__


@dataclass(frozen=True)
class Frame:
    """The fields that every chunk of one answer repeats.

    Attributes:
        model: Name of the model.
        fingerprint: Of the weights and of this version.
        id: Of the answer.
        created: Seconds since 1970.
    """

    model: str
    fingerprint: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def around(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns an answer or a chunk."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


def make_frame(served: ServedModel, prefix: str) -> Frame:
    """Returns the frame of a new answer."""
    return Frame(served.name, fingerprint(served), f"{prefix}-{uuid.uuid4().hex}")


def fingerprint(served: ServedModel) -> str:
    """Returns a short name of the weights with this version; another one means that answers may differ."""
    facts = served.link.facts
    told = f"{__version__} {facts.line} {facts.parameters} {facts.weight_bytes} {served.adapter}"
    return f"refold-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def usage(prompts: list[list[int]], asking: Asking) -> dict[str, Any]:
    """Returns the numbers of tokens of a request that has ended."""
    prompt_tokens = sum(map(len, prompts))
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": asking.num_new_tokens,
        "total_tokens": prompt_tokens + asking.num_new_tokens,
        "prompt_tokens_details": {"cached_tokens": asking.num_cached_tokens},
    }


def refold_tokens(part: ChoicePart, prompter: Prompter, has_logprobs: bool) -> list[dict[str, Any]]:
    """Returns each token with its text and depth; the texts joined are the text of the part."""
    entries: list[dict[str, Any]] = []
    for token, text in part.tokens:
        if token is None:
            entries.append({"id": None, "text": text, "depth": None})
            continue
        entry: dict[str, Any] = {"id": token.token, "text": text, "depth": token.depth}
        if has_logprobs:
            entry["logprob"] = token.logprob
            entry["alternatives"] = [
                {"id": each.token, "text": prompter.piece(each.token)[0], "logprob": each.logprob}
                for each in token.alternatives or ()
            ]
        entries.append(entry)
    return entries
