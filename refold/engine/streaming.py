"""Streams of many requests at once: the engine runs in a thread, and coroutines take the text as it comes."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType

from refold.engine.engine import Engine
from refold.engine.intake import AnyPrompt
from refold.engine.results import Piece, Result
from refold.engine.sequence import Request
from refold.errors import RefoldError
from refold.generation.sampling import Sampling


class StreamingEngine:
    """An engine that runs in a thread of its own, as an asynchronous context manager.

    Args:
        engine: It may not be used otherwise as long as the context is open.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._inbox: deque[Callable[[], None]] = deque()
        self._awake = threading.Event()
        self._closing = False
        self._open: dict[int, asyncio.Queue[Piece | BaseException | None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="refold-engine", daemon=True)
        self.failure: BaseException | None = None

    async def __aenter__(self) -> "StreamingEngine":
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        self._awake.set()
        await asyncio.to_thread(self._thread.join)

    async def stream(
        self, prompt: AnyPrompt, sampling: Sampling | None = None, *, chat: bool = False
    ) -> AsyncIterator[Piece]:
        """Answers a prompt and yields its text as it comes; leaving the iteration cancels the request.

        Args:
            prompt: As for `Engine.generate`.
            sampling: Settings; None: greedy.
            chat: Whether to apply the chat template to a text.

        Raises:
            RefoldError: The prompt or a setting does not fit, or the queue is full.
        """
        request, pieces = await self._begin(prompt, sampling, chat)
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self._leave(request)

    async def answer(self, prompt: AnyPrompt, sampling: Sampling | None = None, *, chat: bool = False) -> Result:
        """Answers a prompt and returns its result; a cancelled task cancels the request. Arguments as for `stream`."""
        request, pieces = await self._begin(prompt, sampling, chat)
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
            return request.result()
        finally:
            self._leave(request)

    async def _begin(
        self, prompt: AnyPrompt, sampling: Sampling | None, chat: bool
    ) -> tuple[Request, "asyncio.Queue[Piece | BaseException | None]"]:
        if self.failure is not None:
            raise RefoldError(f"engine: a running engine is required (it stopped: {self.failure})")
        request = await asyncio.to_thread(lambda: self.engine.prepare(prompt, sampling, chat=chat))
        pieces: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
        request.listener = lambda piece: self._put(request, piece)
        self._open[id(request)] = pieces
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def submit() -> None:
            try:
                self.engine.submit(request)
            except BaseException as error:
                self._call(begun.set_exception, error)
            else:
                self._call(begun.set_result, None)

        self._inbox.append(submit)
        self._awake.set()
        try:
            await begun
        except BaseException:
            self._leave(request)
            raise
        return request, pieces

    def _leave(self, request: Request) -> None:
        """Forgets a request, and cancels it if it has not ended."""
        self._open.pop(id(request), None)
        if not request.is_finished:
            self._inbox.append(lambda: self.engine.cancel(request))
            self._awake.set()

    def _put(self, request: Request, piece: Piece | BaseException | None) -> None:
        pieces = self._open.get(id(request))
        if pieces is not None:
            self._call(pieces.put_nowait, piece)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        assert self._loop is not None
        # A loop that has closed has nobody left to tell.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _run(self) -> None:
        try:
            while not self._closing:
                while self._inbox:
                    self._inbox.popleft()()
                if not self.engine.has_work:
                    self._awake.wait()
                    self._awake.clear()
                    continue
                for request in self.engine.step():
                    self.engine.take(request)
                    self._put(request, None)
        except BaseException as error:
            self.failure = error
            for pieces in list(self._open.values()):
                self._call(
                    pieces.put_nowait, RefoldError(f"engine: a running engine is required (it stopped: {error})")
                )
