"""Answers of an engine while it runs: the text of one prompt as it comes, and the results of a file of prompts."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from refold.engine.engine import Engine
from refold.engine.intake import AnyPrompt
from refold.engine.prompt_file import PromptFile
from refold.engine.result_file import ResultFile
from refold.engine.results import Result
from refold.engine.sequence import Request
from refold.errors import DataError, RefoldError
from refold.generation.sampling import Sampling

_AHEAD = 4
"""Requests that wait in the engine for each row."""


@dataclass(frozen=True)
class FileReport:
    """The end of a run over a file of prompts.

    Attributes:
        prompts: Number of prompts in the file.
        answered: Number of results that this run added.
        failed: Number of them with a fault.
    """

    prompts: int
    answered: int
    failed: int


def stream_text(
    engine: Engine, prompt: AnyPrompt, sampling: Sampling | None = None, *, chat: bool = False
) -> Iterator[str]:
    """Answers a prompt and yields the text of its first choice in pieces as it comes; arguments as for `generate`.

    The call itself raises errors of its arguments. Closing the iterator cancels the request.

    Raises:
        RefoldError: As for `Engine.generate`, or the model failed.
    """
    request = engine.prepare(prompt, sampling, chat=chat)
    pieces: deque[str] = deque()
    request.listener = lambda piece: pieces.append(piece.text) if piece.choice == 0 else None
    engine.submit(request)
    return _stream(engine, request, pieces)


def _stream(engine: Engine, request: Request, pieces: deque[str]) -> Iterator[str]:
    try:
        while not request.is_finished:
            engine.step()
            while pieces:
                if piece := pieces.popleft():
                    yield piece
        require_success(engine.take(request))
    finally:
        if not request.is_finished:
            engine.cancel(request)


def require_success(result: Result) -> Result:
    """Returns a result without a fault.

    Raises:
        RefoldError: A choice ended with a fault.
    """
    for choice in result.choices:
        if choice.reason == "error":
            raise RefoldError(f"{choice.error}")
    return result


def answer_file(
    engine: Engine,
    prompts: PromptFile,
    results: ResultFile,
    *,
    chat: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> FileReport:
    """Answers the prompts of a file that have no result yet, and adds the results in the order of completion.

    Args:
        engine: The engine.
        prompts: The prompts.
        results: The open file of results.
        chat: Whether to apply the chat template to texts; to conversations it always applies.
        on_progress: Called with the number of prompts that have results, and of all.

    Raises:
        DataError: A prompt is empty, too long or outside the vocabulary, or its settings do not fit the model; the
            message names its line, and nothing has run.
    """
    requests = []
    for index, line in enumerate(prompts.lines):
        if index in results.finished:
            continue
        try:
            requests.append(engine.prepare(line.prompt, line.sampling, chat=chat, index=index))
        except RefoldError as error:
            raise DataError(f"{line.where}: {error}") from None
    tell = on_progress or (lambda done, total: None)
    failed = 0
    tell(len(results.finished), len(prompts.lines))
    for result in _answer(engine, requests):
        results.add(result, prompts.lines[result.index].id)
        failed += any(choice.reason == "error" for choice in result.choices)
        tell(len(results.finished), len(prompts.lines))
    return FileReport(len(prompts.lines), len(requests), failed)


def _answer(engine: Engine, requests: Iterable[Request]) -> Iterator[Result]:
    """Yields the results of requests in the order of completion; only some wait in the engine at a time."""
    most = _AHEAD * engine.settings.max_rows
    most = min(most, engine.settings.max_queue or most)
    waiting, running = deque(requests), dict[int, Request]()
    try:
        while waiting or running:
            while waiting and (
                not running or sum(each.sampling.n for each in running.values()) + waiting[0].sampling.n <= most
            ):
                request = waiting.popleft()
                engine.submit(request)
                running[request.index] = request
            for request in engine.step():
                if running.pop(request.index, None) is not None:
                    yield engine.take(request)
    finally:
        for request in running.values():
            engine.cancel(request)
