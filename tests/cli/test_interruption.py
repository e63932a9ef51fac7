"""Signals: one line with the command to type, and nothing half written stays."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from refold.healing.interruption import Stopped, stop_on_signals

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

PAUSED = """
import sys, time
import {module} as module
from refold.cli import main

def wait(*arguments, **options):
    print("waiting", flush=True)
    time.sleep(60)

module.{name} = wait
sys.argv = ["refold", *sys.argv[1:]]
main()
"""
"""Runs the command line with one function that waits for a signal in its place."""


def interrupt(script: str, arguments: list[str], number: int) -> tuple[int, list[str]]:
    """Sends a signal to a command when it waits; returns exit status and the lines on stderr."""

    def listen() -> None:  # what starts the tests may have switched signals off
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors.splitlines()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_an_interrupted_conversion_leaves_nothing_and_says_what_to_type(
    number: signal.Signals, shipped: Path, tmp_path: Path
) -> None:
    # Waits when the weights are being written into the hidden folder beside the destination.
    script = PAUSED.format(module="refold.conversion.vocabulary", name="copy_companions")
    arguments = ["convert", str(shipped), str(tmp_path / "out folder"), "-r", "recursive"]
    status, lines = interrupt(script, arguments, number)
    assert status == 128 + number
    assert lines == [f"refold: interrupted by {number.name}; to go on, type: {shlex.join(['refold', *arguments])}"]
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_heal_names_its_checkpoint_and_the_command(shipped: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"def number_{index}():\n    return {index}\n" for index in range(3000)))
    script = """
import signal
from refold.healing.loop import Loop
from refold.cli import main
import sys

step = Loop.step
def interrupted(self):
    record = step(self)
    if record.step == 2:
        signal.raise_signal(signal.SIGHUP)
    return record

print("waiting", flush=True)
Loop.step = interrupted
sys.argv = ["refold", *sys.argv[1:]]
main()
"""
    arguments = ["heal", str(shipped), str(tmp_path / "out"), "-d", str(text), "-t", "20k", "--device", "cpu"]
    status, lines = interrupt(script, arguments, 0)
    assert status == 129
    command = shlex.join(["refold", *arguments])
    assert lines[-1] == (f"refold: heal: interrupted after step 2 of 40, which is saved; to go on, type: {command}")
    assert [path.name for path in (tmp_path / ".out.heal" / "checkpoints").iterdir()] == ["step-000000002"]


def test_signals_that_were_switched_off_stay_so() -> None:
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_signal_stops_and_handlers_are_put_back() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(Stopped, match="interrupted by SIGTERM") as caught, stop_on_signals():
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.exit_code == 143
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_catches_every_exception_does_not_swallow_a_stop() -> None:
    assert not issubclass(Stopped, (Exception, KeyboardInterrupt))
