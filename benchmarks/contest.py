"""Contenders in processes of their own, of which one runs at a time, round by round.

A process that does not run is stopped by a signal, so that its threads may spin without disturbing the others.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
BUSY = 0.1
"""Share of the machine's time from which on other processes disturb a measurement."""


class ContenderFailed(RuntimeError):
    """A contender ended, or answered with an error."""


@dataclass
class Competitor:
    """A contender's process.

    Attributes:
        name: Name in tables.
        command: Its command.
        log: File for its stderr.
        facts: Its first line, once it is ready.
    """

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        """Starts the process, waits until it is ready, and stops it."""
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **self.environment},
            )
        self.facts = self._read()
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Lets the process run for one request and returns its answer.

        Raises:
            ContenderFailed: It ended or failed.
        """
        process = self._running()
        process.send_signal(signal.SIGCONT)
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return self._read()
        except BrokenPipeError:
            raise ContenderFailed(self._said("ended")) from None
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        """Ends the process."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.send_signal(signal.SIGCONT)
            self.process.wait()
        self.process = None

    def cpu_seconds(self) -> float:
        """Returns the CPU time that the process has used."""
        return 0.0 if self.process is None else _cpu_seconds(self.process.pid)

    def _running(self) -> "subprocess.Popen[str]":
        if self.process is None or self.process.poll() is not None:
            raise ContenderFailed(self._said("is not running"))
        return self.process

    def _read(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise ContenderFailed(self._said("ended"))
        answer = json.loads(line)
        if "error" in answer:
            raise ContenderFailed(f"{self.name}: {answer['error']}")
        return answer

    def _said(self, what: str) -> str:
        tail = self.log.read_text()[-1500:] if self.log.exists() else ""
        return f"{self.name} {what}: {tail}"


@dataclass
class Case:
    """The measurements of one workload.

    Attributes:
        request: The workload.
        answers: For each contender its answers, round by round.
        failures: For each contender that failed its message.
        others: Share of the machine's time that other processes took.
        notes: Figures of single further requests, by kind and contender.
        commit: Of the checkout that measured it.
    """

    request: dict[str, Any]
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    others: float = 0.0
    notes: dict[str, dict[str, float]] = field(default_factory=dict)
    commit: str = ""

    @property
    def num_new(self) -> int:
        """New tokens of the workload."""
        return sum(self.request["new"])

    def seconds(self, name: str) -> list[float]:
        """Times of a contender, round by round."""
        return [answer["seconds"] for answer in self.answers[name]]

    def tokens(self, name: str) -> list[list[int]]:
        """New tokens of a contender."""
        return self.answers[name][0]["tokens"]

    def peak(self, name: str) -> int:
        """Largest resident memory of a contender in bytes."""
        return max(answer["peak"] for answer in self.answers[name])

    def extra(self, name: str) -> dict[str, Any]:
        """Further figures of a contender's last round."""
        return self.answers[name][-1]["extra"]

    def save(self, path: Path) -> None:
        """Writes the case; tokens of the first round alone."""
        for answers in self.answers.values():
            for answer in answers[1:]:
                answer.pop("tokens", None)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(vars(self)))
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Case":
        """Reads a written case."""
        return cls(**json.loads(path.read_text()))


def compete(
    competitors: Sequence[Competitor],
    request: dict[str, Any],
    rounds: int,
    how: Callable[[str, Case], Mapping[str, Any]] = lambda name, case: {},
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Case:
    """Runs all contenders in every round, in reversed order every other round, after a short warm-up of each.

    Args:
        competitors: Contenders that are ready.
        request: The workload.
        rounds: Number of rounds.
        how: Function of a contender's name and the case so far to its wishes.
        say: Called with a line about each failure.
    """
    case, alive = Case(request), list(competitors)
    short = {**request, "new": [min(4, count) for count in request["new"]]}

    def ask(competitor: Competitor, asked: Mapping[str, Any]) -> None:
        try:
            answer = competitor.ask({**asked, "how": dict(how(competitor.name, case))})
        except ContenderFailed as error:
            case.failures[competitor.name] = str(error)[-600:]
            say(f"{competitor.name} is out: {error}")
            alive.remove(competitor)
            return
        if asked is request:
            case.answers.setdefault(competitor.name, []).append(answer)

    for competitor in list(alive):
        ask(competitor, short)
    clock = _Foreign(competitors)
    for number in range(rounds):
        for competitor in list(alive) if number % 2 == 0 else alive[::-1]:
            ask(competitor, request)
    case.others = clock.share()
    # A contender that failed on its way has fewer rounds than the others: it is not compared.
    for name in case.failures:
        case.answers.pop(name, None)
    return case


class _Foreign:
    """Measures the share of the machine's time that processes outside the contest take."""

    def __init__(self, competitors: Sequence[Competitor]):
        self._competitors = competitors
        self._begun, self._busy, self._own = time.perf_counter(), _machine_seconds(), self._contest()

    def share(self) -> float:
        """Returns the share since the beginning."""
        cores, passed = os.cpu_count() or 1, time.perf_counter() - self._begun
        foreign = (_machine_seconds() - self._busy) - (self._contest() - self._own)
        return max(0.0, foreign / (cores * max(passed, 1e-9)))

    def _contest(self) -> float:
        return time.process_time() + sum(each.cpu_seconds() for each in self._competitors)


def _machine_seconds() -> float:
    """Returns the CPU time that all processes together have used since the machine began."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, soft, *_ = map(int, stat.read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + soft) / TICKS


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS
