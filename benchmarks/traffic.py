"""Requests of a mixed crowd: sound ones of many kinds, malformed ones, and clients that leave or dawdle."""

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from load_client import PATIENT, Manner, make_request

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CANCELS, DISCONNECTS, HALVES, SLOW, MALFORMED = 0.10, 0.03, 0.01, 0.05, 0.05
"""Shares of requests: cancelled after some pieces; reset at a random time; left in the middle of sending; read slowly;
malformed."""
CHARACTERS_PER_TOKEN = 2.0
"""Fewer than any text has, so that prompts fit."""
STOPS = (".", ",", "\n", " the", "the", "and", "e ", "def", "return", "(")


@dataclass(frozen=True)
class Call:
    """One request of the crowd.

    Attributes:
        kind: In tables.
        request: Its bytes.
        manner: How its client treats the connection.
        statuses: Statuses that are right.
        body: Of a sound request; empty: it is malformed.
        path: Of its route.
    """

    kind: str
    request: bytes
    manner: Manner = PATIENT
    statuses: tuple[int, ...] = (200,)
    body: Mapping[str, Any] = field(default_factory=dict)
    path: str = ""

    @property
    def num_choices(self) -> int:
        """Choices that it asks for."""
        return self.body.get("n", 1)

    @property
    def leaves(self) -> bool:
        """Whether its client does not wait for the end."""
        return self.manner.leave_after is not None or self.manner.abort_at is not None


class Traffic:
    """Makes requests, each from the seed and its number alone.

    Args:
        seed: Of all of them.
        text: Where prompts are cut from.
        models: Names that may be asked for.
        has_chat: Whether they have a chat template.
        max_context: Most tokens of prompt and answer.
        most_new: Most new tokens of an answer.
    """

    def __init__(
        self, seed: int, text: str, models: Sequence[str], *, has_chat: bool, max_context: int, most_new: int = 96
    ):
        self._seed, self._text, self._models, self._has_chat = seed, text, list(models), has_chat
        self._max_context, self._most_new = max_context, min(most_new, max_context // 3)
        self._beginnings = [self._cut(random.Random(f"{seed} {place}"), 64) for place in range(4)]

    def call(self, number: int) -> Call:
        """Returns a request."""
        draw = random.Random(f"{self._seed} call {number}")
        if draw.random() < MALFORMED:
            kind = draw.choice(list(_MALFORMED))
            request, statuses = _MALFORMED[kind](self._models[0], self._max_context)
            return Call(kind, request, statuses=statuses)
        path, body = self._sound(draw)
        kind = "chat" if path == CHAT else _kind(body)
        return Call(kind, make_request("POST", path, body), self._manner(draw), body=body, path=path)

    def _sound(self, draw: random.Random) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"model": draw.choice(self._models), "max_tokens": _between(draw, 1, self._most_new)}
        if draw.random() < 0.75:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        body |= {"temperature": 0} if draw.random() < 0.6 else {"temperature": 0.8, "seed": draw.randrange(1 << 30)}
        if draw.random() < 0.15:
            body["stop"] = draw.sample(STOPS, draw.randint(1, 4))
        if draw.random() < 0.10:
            body["n"] = draw.randint(2, 4)
        if draw.random() < 0.10:
            body |= {"presence_penalty": 0.5, "frequency_penalty": 0.5, "top_p": 0.9}
        if draw.random() < 0.15:
            body["return_tokens"] = True
        most = self._max_context - self._most_new - 8
        prompt = self._cut(draw, _between(draw, 1, most // 2))
        if draw.random() < 0.3:
            prompt = draw.choice(self._beginnings) + prompt
        if self._has_chat and draw.random() < 0.2:
            body["messages"] = [{"role": "user", "content": prompt}]
            body |= {"logprobs": True, "top_logprobs": 3} if draw.random() < 0.15 else {}
            return CHAT, body
        body["prompt"] = prompt
        body |= {"logprobs": draw.randint(0, 5)} if draw.random() < 0.15 else {}
        return COMPLETIONS, body

    def _manner(self, draw: random.Random) -> Manner:
        drawn = draw.random()
        for share, manner in (
            (CANCELS, Manner(leave_after=draw.randint(1, 12), abort_at=20.0)),
            (DISCONNECTS, Manner(abort_at=draw.uniform(0.0, 8.0))),
            (HALVES, Manner(send_share=draw.uniform(0.0, 0.95), abort_at=0.3)),
            (SLOW, Manner(pause=draw.uniform(0.05, 0.3))),
        ):
            if drawn < share:
                return manner
            drawn -= share
        return PATIENT

    def _cut(self, draw: random.Random, num_tokens: int) -> str:
        """Returns a piece of the text that has at most so many tokens."""
        length = max(1, int(num_tokens * CHARACTERS_PER_TOKEN))
        start = draw.randrange(max(1, len(self._text) - length))
        return self._text[start : start + length]


def _between(draw: random.Random, low: int, high: int) -> int:
    """Draws a number whose logarithm is uniform, so that short and long ones both occur."""
    return round(math.exp(draw.uniform(math.log(low), math.log(max(low, high)))))


def _kind(body: Mapping[str, Any]) -> str:
    named = [name for name in ("n", "stop", "logprobs", "return_tokens") if name in body]
    return "completion" + (f" with {named[0]}" if named else "")


def _post(body: Any, path: str = COMPLETIONS, **headers: str) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return make_request("POST", path, raw, {name.replace("_", "-"): value for name, value in headers.items()})


def _with(**fields: Any) -> Callable[[str, int], tuple[bytes, tuple[int, ...]]]:
    return lambda model, _: (_post({"model": model, "prompt": "a", "max_tokens": 4, **fields}), (400,))


def _raw(request: bytes, *statuses: int) -> Callable[[str, int], tuple[bytes, tuple[int, ...]]]:
    return lambda model, context: (request, statuses)


_MALFORMED: dict[str, Callable[[str, int], tuple[bytes, tuple[int, ...]]]] = {
    "JSON that is cut off": _raw(_post(b'{"model": "a", "prom'), 400),
    "JSON that is a list": _raw(_post([1, 2]), 400),
    "JSON nested 10,000 deep": _raw(_post(b"[" * 10_000), 400),
    "invalid UTF-8": _raw(_post(b'{"model": "\xff\xfe"}'), 400),
    "unknown field": _with(temprature=1),
    "temperature 99": _with(temperature=99),
    "temperature as a word": _with(temperature="hot"),
    "max_tokens -1": _with(max_tokens=-1),
    "n 0": _with(n=0),
    "logprobs 99": _with(logprobs=99),
    "17 stop strings": _with(stop=[str(each) for each in range(17)]),
    "no prompts": _with(prompt=[]),
    "token outside the vocabulary": _with(prompt=[1 << 40]),
    "prompt over the context": lambda model, context: (
        _post({"model": model, "prompt": [1] * (3 * context), "max_tokens": 4}),
        (400,),
    ),
    "unknown model": lambda model, _: (_post({"model": model + "x", "prompt": "a"}), (404,)),
    "path as a model": lambda model, _: (_post({"model": "../../etc/passwd", "prompt": "a"}), (404,)),
    "unknown role": lambda model, _: (
        _post({"model": model, "messages": [{"role": "king", "content": "a"}]}, CHAT),
        (400,),
    ),
    "text instead of JSON": _raw(_post(b"prompt=a", content_type="text/plain"), 415),
    "unknown route": _raw(make_request("GET", "/v2/answers"), 404),
    "wrong method": _raw(make_request("GET", COMPLETIONS), 405),
    "body over the limit": _raw(_post(b"", content_length="50000000"), 413),
    "no HTTP": _raw(b"HELO server\r\n\r\n", 400),
}
"""Name to a function of the model's name and context that returns a request and its right statuses."""
