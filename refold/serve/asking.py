"""The answers to all prompts of one request, merged as they come."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Self

from refold.engine.results import Reason
from refold.generation.sampling import Sampling
from refold.serve.faults import ApiFault, field_fault
from refold.serve.forms import AnswerForm, form_fault
from refold.serve.link import EngineLostError, JobAnswer, RefusedError
from refold.serve.messages import Ended, TextPart, TokenPart
from refold.serve.served import ServedModel


@dataclass
class ChoicePart:
    """New text and tokens of one choice since the last look.

    Attributes:
        text: Its text.
        tokens: Each token with its text, where tokens were asked for; None as token: text that belongs to none.
        reason: Why it ended; None while it goes on.
        prompt: Log-probabilities of the prompt's tokens, None for the first; None where none were asked for.
    """

    text: str = ""
    tokens: list[tuple[TokenPart | None, str]] = field(default_factory=list)
    reason: Reason | None = None
    prompt: Sequence[Any] | None = None

    def add(self, part: TextPart, wants_tokens: bool) -> None:
        """Takes the next message."""
        self.text += part.text
        self.reason = part.reason or self.reason
        if wants_tokens and (part.token is not None or part.text):
            self.tokens.append((part.token, part.text))

    def join(self, other: "ChoicePart") -> None:
        """Takes what came next."""
        self.text += other.text
        self.tokens += other.tokens
        self.reason = other.reason or self.reason


class Asking:
    """Jobs for the prompts of one request, as a context manager; leaving it cancels what has not ended.

    Args:
        served: Who is asked.
        prompts: Tokens of the prompts.
        sampling: Settings.
        seed: Of all prompts; None: a new one for each.
        wants_tokens: Whether each token is told.
        seconds: Time until the request is ended with a fault; None: no limit.
        form: Form that the answers are held to.

    Attributes:
        sampling: Settings, apart from the seed.
        num_prompts: Number of prompts.
        ended: Ends of the jobs that have ended, by prompt.
    """

    def __init__(
        self,
        served: ServedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int | None,
        wants_tokens: bool,
        seconds: float | None,
        form: AnswerForm | None = None,
    ):
        self._served, self._prompts, self.sampling, self._seed = served, prompts, sampling, seed
        self._wants_tokens, self._seconds, self._form = wants_tokens, seconds, form
        self._stack = AsyncExitStack()
        self._events: asyncio.Queue[tuple[int, TextPart] | ApiFault | None] = asyncio.Queue()
        self.num_prompts = self._num_open = len(prompts)
        self._fault: ApiFault | None = None
        self.ended: dict[int, Ended] = {}

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            if self._seconds is not None:
                timer = loop.call_later(self._seconds, self._events.put_nowait, self._late())
                stack.callback(timer.cancel)
            for place, prompt in enumerate(self._prompts):
                seed = secrets.randbits(62) if self._seed is None else self._seed
                answer = self._served.link.answer(
                    prompt,
                    replace(self.sampling, seed=seed),
                    adapter=self._served.adapter,
                    wants_tokens=self._wants_tokens,
                )
                try:
                    await stack.enter_async_context(answer)
                except EngineLostError:
                    raise self._lost() from None
                task = loop.create_task(self._pump(place, answer))
                stack.callback(task.cancel)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def batches(self) -> AsyncIterator[dict[int, ChoicePart]]:
        """Yields what has come, by index of the choice, until all choices have ended.

        Raises:
            ApiFault: The engine refuses the job, fails, or takes too long.
        """
        while self._num_open:
            events = [await self._events.get()]
            while not self._events.empty():
                events.append(self._events.get_nowait())
            found: dict[int, ChoicePart] = {}
            for event in events:
                if isinstance(event, ApiFault):
                    raise event
                if event is None:
                    self._num_open -= 1
                    continue
                place, part = event
                index = place * self.sampling.n + part.choice
                found.setdefault(index, ChoicePart()).add(part, self._wants_tokens)
            if found:
                yield found

    @property
    def num_new_tokens(self) -> int:
        """New tokens of all choices that have ended."""
        return sum(choice.num_tokens for ended in self.ended.values() for choice in ended.choices)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of prompts that earlier prompts had computed."""
        return sum(ended.cached_tokens for ended in self.ended.values())

    async def _pump(self, place: int, answer: JobAnswer) -> None:
        try:
            async for part in answer.parts():
                if part.reason in ("cancelled", "error"):
                    self._events.put_nowait(self._failed(part))
                self._events.put_nowait((place, part))
        except EngineLostError:
            self._events.put_nowait(self._lost())
        except RefusedError as error:
            self._events.put_nowait(self._refused(error))
        else:
            assert answer.ended is not None
            self.ended[place] = answer.ended
            self._events.put_nowait(None)

    def _lost(self) -> ApiFault:
        return _closing() if self._served.link.is_closing else engine_lost()

    def _refused(self, error: RefusedError) -> ApiFault:
        if self._form is not None and str(error).startswith("constraint"):
            return form_fault(self._form, error)
        return field_fault(error, {"max_new_tokens": "max_tokens"})

    def _failed(self, part: TextPart) -> ApiFault:
        if part.reason == "cancelled":
            return _closing()
        if self._form is not None and part.error is not None and part.error.startswith("constraint"):
            return form_fault(self._form, RefusedError(part.error))
        return ApiFault(500, "server: the engine failed on this request", code="engine_fault")

    def _late(self) -> ApiFault:
        return ApiFault(
            504,
            f"server: a request must end within {self._seconds:g} seconds (this one has not)",
            code="request_timeout",
            headers={"x-should-retry": "false"},
        )


def _closing() -> ApiFault:
    return ApiFault(503, "server: the server is closing, so the request was ended", code="closing")


def engine_lost() -> ApiFault:
    """Returns the fault of requests to an engine that has stopped."""
    return ApiFault(503, "server: a running engine is required (it has stopped)", code="engine_lost")
