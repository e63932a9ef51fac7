import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from refold.engine.answers import answer_file, require_success, stream_text
from refold.engine.engine import Engine
from refold.engine.prompt_file import PromptFile, read_prompts
from refold.engine.result_file import ResultFile
from refold.engine.results import Continuation, Piece, Result
from refold.engine.sequence import Request
from refold.engine.settings import EngineSettings
from refold.errors import DataError, RefoldError
from refold.generation.sampling import Sampling


class FakeEngine(Engine):
    """An engine without a model: its answer is the prompt, one letter a step for all requests at once."""

    def __init__(self, rows: int = 1):
        self.settings = EngineSettings(max_rows=rows)
        self.requests: list[Request] = []
        self.most, self.cancelled, self.steps = 0, [], 0
        self.interrupt_at = -1

    def prepare(self, prompt: Any, sampling: Any = None, *, chat: bool = False, index: Any = None, forced: Any = None):
        if prompt == "":
            raise RefoldError("prompt: some text is required (got none)")
        letters = tuple(map(ord, prompt))
        return Request(index or 0, letters, sampling or Sampling(), len(letters))

    def submit(self, request: Request) -> None:
        request.cached_tokens = 0
        self.requests.append(request)
        self.most = max(self.most, len(self.requests))

    def step(self) -> list[Request]:
        if self.steps == self.interrupt_at:
            raise KeyboardInterrupt
        self.steps += 1
        for request in self.requests:
            request.cached_tokens += 1
            place, text = request.cached_tokens, "".join(map(chr, request.prompt_ids))
            is_last = place == len(text)
            if request.listener is not None:
                request.listener(Piece(0, text[place - 1], reason="length" if is_last else None))
            if is_last:
                error = "weights: NaN" if text == "broken" else None
                request.choices[0] = Continuation(text, (), (), "length" if error is None else "error", error=error)
        ended = [request for request in self.requests if request.is_finished]
        self.requests = [request for request in self.requests if not request.is_finished]
        return ended

    def take(self, request: Request) -> Result:
        return request.result()

    def cancel(self, request: Request) -> None:
        self.cancelled.append(request.index)


def prompts_in(folder: Path, *texts: str) -> PromptFile:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return read_prompts(folder / "prompts.jsonl", Sampling())


def run(engine: FakeEngine, prompts: PromptFile, path: Path, **options: Any) -> Any:
    with ResultFile(path, {"prompts_sha256": prompts.sha256}, len(prompts.lines)) as results:
        return answer_file(engine, prompts, results, **options)


def indices(path: Path) -> list[int]:
    return [json.loads(line)["index"] for line in path.read_text().splitlines()]


def test_a_file_is_answered_in_the_order_of_completion_with_progress(tmp_path: Path):
    prompts, seen = prompts_in(tmp_path, "aaa", "a", "aa", "broken"), []
    report = run(FakeEngine(), prompts, tmp_path / "out", on_progress=lambda *each: seen.append(each))
    assert (report.prompts, report.answered, report.failed) == (4, 4, 1)
    assert indices(tmp_path / "out") == [1, 2, 0, 3]
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_finished_prompts_are_skipped(tmp_path: Path):
    prompts, engine = prompts_in(tmp_path, "aaa", "a", "aa"), FakeEngine()
    engine.interrupt_at = 1
    with pytest.raises(KeyboardInterrupt):
        run(engine, prompts, tmp_path / "out")
    assert indices(tmp_path / "out") == [1]
    assert sorted(engine.cancelled) == [0, 2]
    report = run(FakeEngine(), prompts, tmp_path / "out")
    assert (report.answered, indices(tmp_path / "out")) == (2, [1, 2, 0])


def test_only_some_requests_wait_in_the_engine(tmp_path: Path):
    engine, prompts = FakeEngine(rows=2), prompts_in(tmp_path, *["ab"] * 50)
    run(engine, prompts, tmp_path / "out")
    assert engine.most == 8
    assert sorted(indices(tmp_path / "out")) == list(range(50))


def test_a_prompt_that_does_not_fit_is_named_before_anything_runs(tmp_path: Path):
    engine, prompts = FakeEngine(), prompts_in(tmp_path, "aaa", "", "aa")
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: prompt: some text is required"):
        run(engine, prompts, tmp_path / "out")
    assert engine.steps == 0
    assert not (tmp_path / "out").exists()


def test_text_comes_in_pieces_and_leaving_cancels():
    engine = FakeEngine()
    assert list(stream_text(engine, "abc", Sampling())) == ["a", "b", "c"]
    stream = stream_text(engine, "abc", Sampling())
    assert next(stream) == "a"
    assert isinstance(stream, Generator)
    stream.close()
    assert engine.cancelled == [0]
    with pytest.raises(RefoldError, match="some text is required"):
        stream_text(engine, "", Sampling())


def test_a_fault_is_an_error():
    engine = FakeEngine()
    with pytest.raises(RefoldError, match="weights: NaN"):
        list(stream_text(engine, "broken", Sampling()))
    with pytest.raises(RefoldError, match="weights: NaN"):
        require_success(Result(0, (1,), (Continuation("", (), (), "error", error="weights: NaN"),)))
