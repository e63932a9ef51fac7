"""Conversations in the terminal: commands, lines that are typed or piped, and how words are wrapped."""

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from refold.errors import RefoldError
from refold.serve.dialogue import Dialogue, WordWrap, converse
from refold.serve.speakers import Speaker, SpeakSettings, Turn


class Echo(Speaker):
    """A speaker that repeats what it hears, word by word."""

    name = "echo"

    def __init__(self, has_chat: bool = True):
        self.has_chat = has_chat
        self.heard: list[Any] = []
        self.seeds: list[int] = []

    def chat(self, turns: Sequence[Turn], settings: SpeakSettings) -> Generator[str]:
        self.heard.append([each["content"] for each in turns])
        return self._say(turns[-1]["content"], settings)

    def complete(self, text: str, settings: SpeakSettings) -> Generator[str]:
        self.heard.append(text)
        return self._say(text.split("|")[-1], settings)

    def _say(self, text: str, settings: SpeakSettings) -> Generator[str]:
        self.seeds.append(settings.seed)
        yield "you said "
        if text == "fail":
            raise RefoldError("chat: it broke off")
        if text == "stop":
            raise KeyboardInterrupt
        yield text


def talk(speaker: Speaker, text: str, system: str | None = None) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(text))
        converse(Dialogue(speaker, SpeakSettings(seed=5), system), speaker)
    return out.getvalue()


def test_piped_lines_get_answers() -> None:
    echo = Echo()
    assert (
        talk(echo, "one\n\n  \ntwo\r\n/reset\nthree", system="be kind")
        == "you said one\nyou said two\nyou said three\n"
    )
    assert echo.heard == [
        ["be kind", "one"],
        ["be kind", "one", "you said one", "two"],
        ["be kind", "three"],
    ]
    assert echo.seeds == [5, 6, 7]


def test_exit_ends() -> None:
    assert talk(Echo(), "one\n/exit\ntwo\n") == "you said one\n"


def test_a_model_without_template_continues_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    echo = Echo(has_chat=False)
    assert talk(echo, "a\n|b\n") == "you said a\nyou said b\n"
    assert echo.heard == ["a", "ayou said a|b"]
    assert "no chat template" in capsys.readouterr().err
    with pytest.raises(RefoldError, match="system: a model with a chat template is required"):
        talk(echo, "a\n", system="be kind")


def test_a_piped_line_that_fails_ends() -> None:
    with pytest.raises(RefoldError, match="it broke off"):
        talk(Echo(), "fail\none\n")


def test_a_failed_turn_is_forgotten_and_a_stopped_one_is_kept() -> None:
    echo = Echo()
    dialogue = Dialogue(echo, SpeakSettings())
    with pytest.raises(RefoldError):
        list(dialogue.answer("fail"))
    with pytest.raises(KeyboardInterrupt):
        list(dialogue.answer("stop"))
    pieces = dialogue.answer("left")
    next(pieces)
    pieces.close()
    list(dialogue.answer("end"))
    assert echo.heard[-1] == ["stop", "you said ", "left", "you said ", "end"]


@pytest.mark.parametrize(
    ("width", "pieces", "expected"),
    [
        (10, ["hello wor", "ld again"], "hello \nworld \nagain\n"),
        (10, ["0123456789abc d"], "0123456789\nabc d\n"),
        (10, ["a\n\nb  c"], "a\n\nb  c\n"),
        (10, ["red \x1b[31m", "x\x07"], "red \n\N{REPLACEMENT CHARACTER}[31mx\N{REPLACEMENT CHARACTER}\n"),
        (None, ["0123456789 012345", "\x1b"], "0123456789 012345\x1b\n"),
    ],
)
def test_lines_break_between_words(width: int | None, pieces: list[str], expected: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        wrap = WordWrap(width)
        for piece in pieces:
            wrap.write(piece)
        wrap.end()
    assert out.getvalue() == expected
    if width is not None:
        assert max(map(len, out.getvalue().splitlines())) <= width


def in_terminal(steps: Sequence[tuple[str, bytes | int]]) -> str:
    """Talks to `slow_talk.py` in a terminal: waits for a text, then types bytes, or sends a signal.

    Each step is a text and the reaction to it. A signal is sent again while nothing comes: Python does not notice one
    that arrives between its prompt and its wait for a line."""
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "slow_talk.py")], stdin=inside, stdout=inside, stderr=inside
    )
    os.close(inside)
    seen, place, last = "", 0, 0
    try:
        for text, reaction in steps:
            deadline = time.monotonic() + 60
            while (found := seen.find(text, place)) < 0:
                assert time.monotonic() < deadline, f"{text!r} is not in {seen!r}"
                if select.select([terminal], [], [], 2)[0]:
                    try:
                        seen += os.read(terminal, 4096).decode()
                    except OSError:
                        pytest.fail(f"{text!r} is not in {seen!r}")
                elif last:
                    process.send_signal(last)
            place, last = found + len(text), 0
            if isinstance(reaction, bytes):
                os.write(terminal, reaction)
            else:
                process.send_signal(reaction)
                last = reaction
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    return seen


def test_a_terminal_has_prompts_interrupts_and_an_end() -> None:
    seen = in_terminal(
        [
            ("> ", b"one\n"),
            ("heard one", b""),
            ("> ", b"long\n"),
            ("on on", signal.SIGINT),
            ("> ", b"/help\n"),
            ("/reset begins anew", b""),
            ("> ", signal.SIGINT),
            ("/reset begins anew", b""),
            ("> ", b"/reset\n"),
            ("> ", b"two\n"),
            ("heard two", b""),
            ("> ", b"\x04"),
            ("ended well", b""),
        ]
    )
    assert "slow. /reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer." in seen
