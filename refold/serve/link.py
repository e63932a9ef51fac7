"""The server's side: jobs go to an engine, and coroutines take what comes back."""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Self

from refold.errors import RefoldError
from refold.generation.sampling import Sampling
from refold.serve.messages import (
    Cancel,
    Ended,
    EngineFacts,
    EngineState,
    GenerationJob,
    Refused,
    StopEngine,
    TextPart,
    WireMessage,
)

if TYPE_CHECKING:
    from refold.serve.host import EngineHost, Send


class RefusedError(RefoldError):
    """The engine does not take a job: a setting does not fit the model."""


class EngineLostError(RefoldError):
    """The engine has stopped, and with it every job."""


class JobAnswer:
    """The answer to one job as it comes; as a context manager it cancels the job when it is left.

    Attributes:
        job: The job.
        ended: The end of it; None before.
    """

    def __init__(self, link: "EngineLink", job: GenerationJob):
        self.job = job
        self.ended: Ended | None = None
        self._link = link
        self._parts: asyncio.Queue[TextPart | Ended | Refused | None] = asyncio.Queue()

    def put(self, message: TextPart | Ended | Refused | None) -> None:
        """Takes the next message of the job; None: the engine is lost."""
        self._parts.put_nowait(message)

    async def __aenter__(self) -> Self:
        self._link.begin(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._link.leave(self)

    async def parts(self) -> AsyncIterator[TextPart]:
        """Yields what comes, until all choices have ended.

        Raises:
            RefusedError: The engine does not take the job; nothing has come.
            EngineLostError: The engine has stopped.
        """
        while self.ended is None:
            message = await self._parts.get()
            if message is None:
                raise EngineLostError(f"engine: a running engine is required ({self._link.failure})")
            if isinstance(message, Refused):
                raise RefusedError(message.message)
            if isinstance(message, Ended):
                self.ended = message
            else:
                yield message


class EngineLink(ABC):
    """An engine that runs elsewhere. All methods are called in the event loop's thread.

    Attributes:
        facts: What the engine is; set by `start`.
        state: The newest state; None before the first, and once the engine has stopped.
        failure: Why the engine has stopped, in one sentence; None while it runs.
        num_restarts: Number of times that it was started again.
        is_closing: Whether the server ends it.
    """

    facts: EngineFacts

    def __init__(self) -> None:
        self.state: EngineState | None = None
        self.failure: str | None = None
        self.num_restarts = 0
        self.is_closing = False
        self._numbers = count()
        self._open: dict[int, JobAnswer] = {}

    @abstractmethod
    async def start(self) -> None:
        """Starts the engine and waits for its facts.

        Raises:
            RefoldError: It does not start.
        """

    @abstractmethod
    async def close(self) -> None:
        """Ends all jobs and the engine."""

    @abstractmethod
    def send(self, message: WireMessage) -> None:
        """Sends a message to the engine, without waiting."""

    @property
    def num_open(self) -> int:
        """Number of sequences of all jobs that have not ended."""
        return sum(each.job.sampling.n for each in self._open.values())

    def answer(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        adapter: str | None = None,
        wants_tokens: bool = False,
    ) -> JobAnswer:
        """Returns the answer to a prompt, which begins when its context is entered.

        Args:
            prompt_ids: Tokens.
            sampling: Settings.
            adapter: Name of the adapters to run with; None: the model's own.
            wants_tokens: Whether parts tell each token.
        """
        job = GenerationJob(
            id=next(self._numbers),
            prompt_ids=tuple(prompt_ids),
            sampling=sampling,
            adapter=adapter,
            wants_tokens=wants_tokens,
        )
        return JobAnswer(self, job)

    def begin(self, answer: JobAnswer) -> None:
        """Sends the job of an answer.

        Raises:
            EngineLostError: The engine has stopped.
        """
        if self.failure is not None:
            raise EngineLostError(f"engine: a running engine is required ({self.failure})")
        self._open[answer.job.id] = answer
        self.send(answer.job)

    def leave(self, answer: JobAnswer) -> None:
        """Forgets an answer, and cancels its job if it has not ended."""
        if self._open.pop(answer.job.id, None) is not None and self.failure is None:
            self.send(Cancel(id=answer.job.id))

    def take(self, messages: Sequence[WireMessage]) -> None:
        """Gives messages of the engine to those who wait for them."""
        for message in messages:
            if isinstance(message, EngineState):
                self.state = message
            elif isinstance(message, EngineFacts):
                self.facts = message
            elif isinstance(message, TextPart | Ended | Refused) and (answer := self._open.get(message.id)) is not None:
                answer.put(message)
                if not isinstance(message, TextPart):
                    del self._open[message.id]

    def lose(self, reason: str) -> None:
        """Ends all answers, because the engine has stopped."""
        self.failure, self.state = reason, None
        for answer in self._open.values():
            answer.put(None)
        self._open.clear()


class ThreadLink(EngineLink):
    """An engine that runs in a thread of this process.

    Args:
        host: Makes the host, given where its messages go.
    """

    def __init__(self, host: "Callable[[Send], EngineHost]"):
        super().__init__()
        self._make = host
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def take(messages: Sequence[WireMessage]) -> None:
            self.take(messages)
            ready.set()

        def send(messages: Sequence[WireMessage]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(take, messages)

        def lose(reason: str) -> None:
            self.lose(reason)
            ready.set()

        self._host = self._make(send)
        self._thread = threading.Thread(target=self._run, args=(loop, lose), name="refold-engine", daemon=True)
        self._thread.start()
        await ready.wait()
        if self.failure is not None:
            raise EngineLostError(f"engine: a running engine is required ({self.failure})")

    async def close(self) -> None:
        self.send(StopEngine())
        assert self._thread is not None
        await asyncio.to_thread(self._thread.join)

    def send(self, message: WireMessage) -> None:
        self._host.receive(message)

    def _run(self, loop: asyncio.AbstractEventLoop, lose: Callable[[str], None]) -> None:
        try:
            self._host.run()
        except BaseException as error:
            loop.call_soon_threadsafe(lose, f"it stopped: {error}")
