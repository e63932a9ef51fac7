"""A conversation in the terminal."""

import contextlib
import shutil
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from dataclasses import replace

from refold.errors import RefoldError
from refold.serve.speakers import Speaker, SpeakSettings, Turn

MOST_COLUMNS = 80
PROMPT = "> "
HELP = "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer."
_TAB = 4
"""Columns between the places that a tab goes to."""


class WordWrap:
    """Writes text to standard output as it comes, and breaks lines between words where a terminal shows it.

    Args:
        width: Columns of a line; None: lines stay as they are.
    """

    def __init__(self, width: int | None):
        self._width = width
        self._column, self._word = 0, ""

    def write(self, text: str) -> None:
        """Writes a piece; the word that it ends with waits for its end."""
        if self._width is None:
            sys.stdout.write(text)
        else:
            for each in text:
                # Control characters of a model's text would steer the terminal.
                self._take(each if each.isprintable() or each in "\n\t" else "\N{REPLACEMENT CHARACTER}")
        sys.stdout.flush()

    def end(self) -> None:
        """Writes what waits, and ends the line."""
        self._flush_word()
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._column = 0

    def _take(self, character: str) -> None:
        assert self._width is not None
        if not character.isspace():
            self._word += character
            if len(self._word) >= self._width:
                self._flush_word()
            return
        self._flush_word()
        if character == "\n" or self._column >= self._width:
            sys.stdout.write("\n")
            self._column = 0
        else:
            size = _TAB - self._column % _TAB if character == "\t" else 1
            sys.stdout.write(" " * size)
            self._column += size

    def _flush_word(self) -> None:
        if self._width is not None and self._column and self._column + len(self._word) > self._width:
            sys.stdout.write("\n")
            self._column = 0
        sys.stdout.write(self._word)
        self._column += len(self._word)
        self._word = ""


class Dialogue:
    """Turns of a user and a model.

    Args:
        speaker: The model.
        settings: How answers are drawn.
        system: A message before the first turn; None: none.

    Raises:
        RefoldError: A system message is given for a model without chat template.
    """

    def __init__(self, speaker: Speaker, settings: SpeakSettings, system: str | None = None):
        if system is not None and not speaker.has_chat:
            raise RefoldError("system: a model with a chat template is required (it has none); drop it")
        self._speaker, self._settings = speaker, settings
        self._system = system
        self._num_answers = 0
        self.reset()

    def reset(self) -> None:
        """Forgets all turns."""
        self._turns: list[Turn] = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._text = ""

    def answer(self, line: str) -> Generator[str]:
        """Yields the answer to a user's line; what has come becomes part of the conversation, also when it is stopped.

        Raises:
            RefoldError: There is no answer; the conversation is as before then.
        """
        settings = replace(self._settings, seed=self._settings.seed + self._num_answers)
        turns, text = [*self._turns, {"role": "user", "content": line}], self._text + line
        told = ""
        pieces = (
            self._speaker.chat(turns, settings) if self._speaker.has_chat else self._speaker.complete(text, settings)
        )
        try:
            for piece in pieces:
                told += piece
                yield piece
        except RefoldError:
            told = ""
            raise
        finally:
            pieces.close()
            if told:
                self._turns = [*turns, {"role": "assistant", "content": told}]
                self._text = text + told
                self._num_answers += 1


def converse(dialogue: Dialogue, speaker: Speaker) -> None:
    """Talks until standard input ends, on a terminal with prompts.

    Args:
        dialogue: The turns so far.
        speaker: Its model.

    Raises:
        RefoldError: An answer to a line that was not typed has failed.
    """
    is_typed = sys.stdin.isatty()
    width = min(MOST_COLUMNS, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None
    wrap = WordWrap(width)
    if not speaker.has_chat:
        print("The model has no chat template: it continues your text.", file=sys.stderr)
    if is_typed:
        print(f"{speaker.name}. {HELP}")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    with _interrupts():
        while (line := _read(is_typed)) is not None:
            command = line.strip()
            if command == "/exit":
                return
            if command == "/reset":
                dialogue.reset()
            elif command.startswith("/") and " " not in command and is_typed:
                print(HELP)
            elif command:
                _show(dialogue, line, wrap, is_typed)


def _show(dialogue: Dialogue, line: str, wrap: WordWrap, is_typed: bool) -> None:
    pieces = dialogue.answer(line)
    try:
        for piece in pieces:
            wrap.write(piece)
    except KeyboardInterrupt:
        # Closing it keeps the part of the answer that has come.
        pieces.close()
        if not is_typed:
            raise
    except RefoldError as error:
        if not is_typed:
            raise
        print(f"{error}", file=sys.stderr)
        return
    wrap.end()


def _read(is_typed: bool) -> str | None:
    """Returns the next line without its end; None: there are no more."""
    while True:
        try:
            if is_typed:
                return input(PROMPT)
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            if not is_typed:
                raise
            print(f"\n{HELP}")


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Lets each Ctrl-C raise KeyboardInterrupt, not the first one alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
