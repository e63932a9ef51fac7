"""One contender in a process of its own: a request is a JSON line on stdin, an answer one on stdout.

Needs only the standard library, so that it runs in the environment of any engine.

A request: `{"prompts": [[ids], ...], "new": [counts], "rows": B, "how": {}}`: continue each prompt greedily by its
count of new tokens, end tokens ignored, at most B at a time. An answer: `{"seconds", "tokens", "peak", "extra"}`: wall
time, new tokens of each prompt, peak resident bytes of the process since the request came, and figures of its own.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """Prompts to continue.

    Attributes:
        prompts: Token ids of each prompt.
        new: Number of new tokens of each prompt.
        rows: Largest number of prompts that may be in work at a time.
        how: Wishes that only some contenders know.
    """

    prompts: list[list[int]]
    new: list[int]
    rows: int
    how: dict[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """The result of a request.

    Attributes:
        tokens: New tokens of each prompt.
        extra: Further figures of the engine.
    """

    tokens: list[list[int]]
    extra: dict[str, Any] = field(default_factory=dict)


def answer_requests(run: Callable[[Request], Answer], **facts: Any) -> None:
    """Says that the contender is ready, then answers requests until stdin ends.

    Args:
        run: Continues the prompts of a request.
        facts: Figures for the first line, such as bytes of weights.
    """
    out = os.fdopen(os.dup(1), "w")
    # Libraries print to stdout too.
    os.dup2(2, 1)
    print(json.dumps({"ready": True, **facts}), file=out, flush=True)
    for line in sys.stdin:
        request = Request(**json.loads(line))
        _forget_peak()
        begun = time.perf_counter()
        try:
            answer = run(request)
        except Exception as error:
            # The parent decides whether the rest of the run goes on.
            traceback.print_exc()
            print(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}), file=out, flush=True)
            continue
        seconds = time.perf_counter() - begun
        found = {"seconds": seconds, "tokens": answer.tokens, "peak": peak_bytes(), "extra": answer.extra}
        print(json.dumps(found), file=out, flush=True)


def peak_bytes() -> int:
    """Returns the peak of resident memory since the last request came, or 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def _forget_peak() -> None:
    # Where this is refused, the peak counts loading too.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
