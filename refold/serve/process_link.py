"""A link to an engine in a process of its own, which is watched, and started again if it ends."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence

from refold import errors
from refold.errors import RefoldError
from refold.serve.engine_child import EngineChild
from refold.serve.link import EngineLink
from refold.serve.messages import EngineFacts, Fault, Open, StopEngine, WireMessage

MOST_RESTARTS = 3
RESTART_SECONDS = 600.0
"""An engine is started again at most `MOST_RESTARTS` times within this time."""
_TICKS = 10
"""Number of looks at a silent engine before it counts as hung."""

logger = logging.getLogger("refold.serve")


class ProcessLink(EngineLink):
    """An engine in a process of its own.

    Args:
        opening: What the process opens.
        restart: Whether an engine that ends is started again.
        watchdog_seconds: Time after which an engine that has work and tells nothing is killed.

    Attributes:
        opening: What the process opens.
        over: Set when the engine has stopped for good.
    """

    def __init__(self, opening: Open, *, restart: bool = False, watchdog_seconds: float = 300.0):
        super().__init__()
        self.opening, self._restart, self._watchdog = opening, restart, watchdog_seconds
        self.over = asyncio.Event()
        self._child: EngineChild | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False
        self._starts: deque[float] = deque()

    @property
    def pid(self) -> int | None:
        """Id of the process; None: there is none."""
        return None if self._child is None else self._child.process.pid

    async def start(self) -> None:
        await self._spawn()
        self._task = asyncio.create_task(self._supervise(), name="refold-engine")

    def send(self, message: WireMessage) -> None:
        # Between the end of a process and the news of it, messages have nowhere to go; `lose` answers them.
        if self._child is not None:
            self._child.write(message)

    async def close(self) -> None:
        self._is_closing = True
        child, task = self._child, self._task
        if child is not None:
            if self.failure is None:
                child.write(StopEngine())
            else:
                child.kill()
            await child.end()
        if task is not None:
            # It reads what the engine has said before its end; while an engine is loading it has nothing to read.
            await asyncio.wait({task}, timeout=1.0)
            task.cancel()
            await asyncio.wait({task})
        if self.failure is None:
            self.lose("it is closed")
        self.over.set()

    def kill(self) -> None:
        """Ends the process at once."""
        self._is_closing = True
        if self._child is not None:
            self._child.kill()

    async def _spawn(self) -> None:
        """Starts a process and waits for its facts.

        Raises:
            RefoldError: It does not start; of the kind that opening the engine has raised.
        """
        child = self._child = await EngineChild.spawn()
        try:
            child.write(self.opening)
            while (messages := await child.read()) is not None:
                _raise_fault(messages)
                self.take(messages)
                if any(isinstance(each, EngineFacts) for each in messages):
                    return
            how = await child.end()
            raise RefoldError(f"engine: a process that starts is required ({how}; its messages stand in the log)")
        except BaseException as error:
            child.kill()
            if isinstance(error, ValueError):
                raise RefoldError(f"engine: messages are required from its process ({error})") from None
            raise

    async def _supervise(self) -> None:
        while True:
            reason = await self._follow()
            if self._is_closing:
                return
            self.lose(reason)
            logger.error("the engine of %s has stopped: %s", self.opening.model, reason)
            if not await self._start_again():
                self.over.set()
                return
            self.failure = None
            self.num_restarts += 1
            logger.info("the engine of %s runs again", self.opening.model)

    async def _start_again(self) -> bool:
        """Starts the engine anew, and says whether it runs."""
        while self._restart and not self._is_closing:
            now = time.monotonic()
            while self._starts and now - self._starts[0] > RESTART_SECONDS:
                self._starts.popleft()
            if len(self._starts) >= MOST_RESTARTS:
                logger.error(
                    "the engine is not started again: it has stopped %d times within %.0f s",
                    len(self._starts) + 1,
                    RESTART_SECONDS,
                )
                return False
            self._starts.append(now)
            try:
                await self._spawn()
                return True
            except RefoldError as error:
                logger.error("the engine does not start: %s", error)
        return False

    async def _follow(self) -> str:
        """Hands on what the engine tells until it stops, and returns why it has."""
        child, num_silent = self._child, 0
        assert child is not None
        reason = None
        while True:
            try:
                async with asyncio.timeout(self._watchdog / _TICKS):
                    messages = await child.read()
            except TimeoutError:
                # Looks are counted, not seconds: after a pause of this process itself there is only one.
                num_silent = num_silent + 1 if self.num_open else 0
                if num_silent < _TICKS:
                    continue
                reason = f"it told nothing for {self._watchdog:.0f} s"
                break
            except ValueError as error:
                logger.error("the engine sends something else than messages: %s", error)
                reason = "it sent no messages"
                break
            num_silent = 0
            if messages is None:
                break
            for fault in messages:
                if isinstance(fault, Fault):
                    # The message may hold paths; the engine has written it to the log.
                    reason = f"it failed with {fault.error}"
            self.take(messages)
        if reason is not None:
            child.kill()
        how = await child.end()
        return how if reason is None else reason


def _raise_fault(messages: Sequence[WireMessage]) -> None:
    for fault in messages:
        if isinstance(fault, Fault):
            kind = getattr(errors, fault.error, RefoldError)
            is_kind = isinstance(kind, type) and issubclass(kind, RefoldError)
            raise (kind if is_kind else RefoldError)(fault.message)
