"""The engine's side: a loop that takes jobs as messages and tells what becomes of them."""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from refold.blueprint.cost import count_parameters
from refold.engine.engine import Engine
from refold.engine.process_memory import resident_bytes
from refold.engine.results import Continuation, Piece
from refold.engine.sequence import Request
from refold.errors import RefoldError
from refold.serve.messages import (
    Cancel,
    ChoiceEnd,
    Ended,
    EngineFacts,
    EngineState,
    GenerationJob,
    LoopSlots,
    Refused,
    StopEngine,
    TextPart,
    TokenPart,
    WireMessage,
)

Send = Callable[[Sequence[WireMessage]], None]
"""Takes the messages of one step, in order."""
STATE_SECONDS = 0.25
"""Time between two states while the engine works."""

logger = logging.getLogger("refold.engine")


class EngineHost:
    """Runs an engine for jobs that come as messages.

    Args:
        engine: It may not be used otherwise as long as the host runs.
        send: Called in the thread of `run`.
    """

    def __init__(self, engine: Engine, send: Send):
        self._engine, self._send = engine, send
        self._inbox: deque[WireMessage] = deque()
        self._awake = threading.Event()
        self._open: dict[int, Request] = {}
        self._outbox: list[WireMessage] = []
        self._is_stopped = False

    def receive(self, message: WireMessage) -> None:
        """Takes a message, in any thread."""
        self._inbox.append(message)
        self._awake.set()

    def run(self) -> None:
        """Tells the engine's facts, then works until a `StopEngine` comes; open jobs end as cancelled then."""
        self._outbox.append(self.facts())
        last = 0.0
        while not self._is_stopped:
            while self._inbox:
                self._take(self._inbox.popleft())
            if self._engine.has_work:
                for request in self._engine.step():
                    self._end(request)
            now = time.monotonic()
            if not self._engine.has_work or now - last >= STATE_SECONDS:
                last = now
                self._outbox.append(self.state())
            self._flush()
            if not self._engine.has_work and not self._inbox and not self._is_stopped:
                self._awake.wait()
                self._awake.clear()

    def facts(self) -> EngineFacts:
        """Returns what the engine is."""
        engine, report = self._engine, self._engine.statistics()
        return EngineFacts(
            line=engine.describe(),
            num_depths=engine.blueprint.num_depths,
            exit_depths=tuple(index + 1 for index, depth in enumerate(engine.blueprint.depths) if depth.exit),
            tolerances=engine.tolerances,
            tolerance=engine.tolerance,
            max_context=min(engine.max_context, engine.max_tokens),
            max_tokens=engine.max_tokens,
            max_rows=engine.settings.max_rows,
            vocab_size=engine.vocab_size,
            num_pages=engine.num_pages,
            page_size=engine.settings.page_size,
            weight_bytes=report.weight_bytes,
            memory_bytes=report.memory_bytes,
            parameters=count_parameters(engine.blueprint).total,
            adapters=engine.adapters,
        )

    def state(self) -> EngineState:
        """Returns the state of the engine."""
        report = self._engine.statistics()
        return EngineState(
            waiting=report.waiting,
            running=report.running,
            used_pages=report.used_pages,
            free_pages=report.free_pages,
            new_tokens=report.counts.new_tokens,
            launches=report.counts.launches,
            depths=dict(report.counts.depths),
            acceptance=report.acceptance,
            preemptions=report.preemptions,
            slots=tuple(LoopSlots(first_depth=depth, rows=rows) for depth, rows in sorted(report.slots.items())),
            memory_bytes=resident_bytes(),
        )

    def _take(self, message: WireMessage) -> None:
        if isinstance(message, GenerationJob):
            self._begin(message)
        elif isinstance(message, Cancel):
            request = self._open.get(message.id)
            if request is not None:
                self._engine.cancel(request)
        elif isinstance(message, StopEngine):
            self._is_stopped = True
            for request in self._open.values():
                self._engine.cancel(request)
            for request in self._engine.step():
                self._end(request)

    def _begin(self, job: GenerationJob) -> None:
        try:
            request = self._engine.prepare(job.prompt_ids, job.sampling, index=job.id, adapter=job.adapter)
            request.listener = lambda piece: self._tell(job, piece)
            self._engine.submit(request)
        except RefoldError as error:
            self._outbox.append(Refused(id=job.id, message=str(error)))
        except Exception:
            # Whatever goes wrong before a job has rows is its own fault, and may not end the others.
            logger.exception("job %d cannot begin", job.id)
            failed = ChoiceEnd(reason="error", num_tokens=0, error="the engine failed to begin the job")
            self._outbox.append(TextPart(id=job.id, choice=0, text="", reason="error"))
            self._outbox.append(Ended(id=job.id, choices=(failed,) * job.sampling.n, cached_tokens=0, seconds={}))
        else:
            self._open[job.id] = request

    def _tell(self, job: GenerationJob, piece: Piece) -> None:
        token = None
        if job.wants_tokens and piece.token is not None:
            made = piece.token
            token = TokenPart(token=made.token, depth=made.depth, logprob=made.logprob, alternatives=made.alternatives)
        if piece.text or piece.is_last or token is not None:
            self._outbox.append(
                TextPart(
                    id=job.id,
                    choice=piece.choice,
                    text=piece.text,
                    token=token,
                    reason=piece.reason,
                    error=piece.error,
                )
            )

    def _end(self, request: Request) -> None:
        result = self._engine.take(request)
        for choice in result.choices:
            if choice.error is not None:
                logger.error("job %d failed: %s", request.index, choice.error)
        del self._open[request.index]
        self._outbox.append(
            Ended(
                id=request.index,
                choices=tuple(_choice_end(each) for each in result.choices),
                cached_tokens=result.cached_tokens,
                seconds=result.seconds,
                prompt_logprobs=result.prompt_logprobs,
            )
        )

    def _flush(self) -> None:
        if self._outbox:
            messages, self._outbox = self._outbox, []
            self._send(messages)


def _choice_end(choice: Continuation) -> ChoiceEnd:
    return ChoiceEnd(
        reason=choice.reason,
        num_tokens=len(choice.token_ids),
        stop=choice.stop,
        error=choice.error,
        depths=dict(Counter(choice.depths)),
    )
