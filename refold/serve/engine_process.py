"""The process of an engine: `python -m refold.serve.engine_process DESCRIPTOR`, started by a server.

It has one socket, over which messages come and go. When the server ends, in whatever way, the socket closes and this
process ends at once, also in the middle of loading.
"""

import gc
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from refold.errors import RefoldError
from refold.serve.line_log import fold_error, log_to_stderr, require_standard_streams

if TYPE_CHECKING:
    from refold.engine.settings import EngineSettings
    from refold.serve.host import EngineHost
    from refold.serve.messages import Open, WireMessage

STALLED_SECONDS = 120.0
"""Time after which a server that takes no bytes counts as lost."""
FAILED = 1
_READ_BYTES = 1 << 16

logger = logging.getLogger("refold.engine")


class Wire:
    """The socket to the server, with one thread that reads, and others that write.

    Args:
        connection: The socket.
    """

    def __init__(self, connection: socket.socket):
        self._socket, self._lock = connection, threading.Lock()
        connection.settimeout(STALLED_SECONDS)

    def lines(self) -> Iterator[bytes]:
        """Yields lines until the server closes the socket."""
        rest = b""
        while True:
            try:
                read = self._socket.recv(_READ_BYTES)
            except TimeoutError:
                continue
            except OSError:
                return
            if not read:
                return
            # Only what is new can end a line, so long lines that come in pieces are not searched again and again.
            if b"\n" not in read:
                rest += read
                continue
            *whole, rest = (rest + read).split(b"\n")
            yield from whole

    def send(self, messages: "Sequence[WireMessage]") -> None:
        """Sends messages in one write. A server that takes no bytes for `STALLED_SECONDS`, or is gone, ends this
        process."""
        from refold.serve.messages import write_line

        left = memoryview(b"".join(map(write_line, messages)))
        try:
            with self._lock:
                while left:
                    left = left[self._socket.send(left) :]
        except OSError:
            os._exit(FAILED)


class Inbox:
    """A thread that reads messages for a host that may not be there yet, and ends the process with the server.

    Args:
        wire: Where messages come from.
    """

    def __init__(self, wire: Wire):
        self._wire = wire
        self._first: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.host: EngineHost | None = None
        threading.Thread(target=self._run, name="refold-inbox", daemon=True).start()

    def first(self) -> "Open":
        """Waits for what the server wants to be opened, and returns it."""
        from refold.serve.messages import Open, read_to_engine

        message = read_to_engine(self._first.get())
        assert isinstance(message, Open), message.kind
        return message

    def _run(self) -> None:
        try:
            lines = self._wire.lines()
            # The first message is read elsewhere: its imports take time, and an end of the server is noticed at once.
            for line in lines:
                self._first.put(line)
                break
            for line in lines:
                self._take(line)
        finally:
            os._exit(0)

    def _take(self, line: bytes) -> None:
        from refold.serve.messages import StopEngine, read_to_engine

        try:
            message = read_to_engine(line)
        except Exception as error:
            # Whatever is wrong with one job may not end the others.
            self._refuse(line, error)
            return
        if self.host is not None:
            self.host.receive(message)
        elif isinstance(message, StopEngine):
            os._exit(0)

    def _refuse(self, line: bytes, error: Exception) -> None:
        from refold.serve.messages import Refused

        logger.error("a message cannot be read: %s", fold_error(error))
        number = json.loads(line).get("id")
        if isinstance(number, int):
            told = str(error) if isinstance(error, RefoldError) else "job: settings that the engine knows are required"
            self._wire.send([Refused(id=number, message=told)])


def main(descriptor: int) -> None:
    """Opens the engine that the server asks for and runs it."""
    # Ctrl-C in a terminal, and a service manager that ends a group, reach this process too; the server lets open
    # requests end first.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    require_standard_streams()
    wire = Wire(socket.socket(fileno=descriptor))
    inbox = Inbox(wire)
    opening = inbox.first()
    status = 0
    with log_to_stderr(opening.log_level):
        try:
            inbox.host = host = open_host(opening, wire)
            # The model stays to the end: looking through its objects would hold up a step.
            gc.freeze()
            host.run()
        except BaseException as error:
            _tell_fault(wire, error)
            status = FAILED
    # Threads of torch and of the inbox may not hold up the end.
    os._exit(status)


def engine_settings(opening: "Open") -> "EngineSettings":
    """Returns the settings of an engine.

    Raises:
        RefoldError: A setting is out of range.
    """
    from refold.checkpoint.manifest import EXITS_NAME
    from refold.engine.settings import Drafts, EngineSettings

    names = ("memory", "max_rows", "max_context", "threads")
    given = {name: value for name in names if (value := getattr(opening, name)) is not None}
    # Requests may ask for exits wherever thresholds are at hand; without --exits the others run the full depth.
    is_calibrated = (Path(opening.model).expanduser() / EXITS_NAME).is_file()
    takes_exits = opening.tolerance is not None or (is_calibrated and not opening.is_lossless)
    return EngineSettings(
        weights=opening.weights,
        exits="calibrated" if takes_exits else None,
        exit_tolerance=(opening.tolerance or 0.0) if takes_exits else None,
        drafts=Drafts() if opening.is_lossless else None,
        **given,
    )


def open_host(opening: "Open", wire: Wire) -> "EngineHost":
    """Opens an engine and returns its host.

    Raises:
        RefoldError: A setting does not fit.
        SourceError: The model is missing or broken.
        FolderError: The folder is torn.
    """
    from refold.engine.engine import Engine
    from refold.serve.host import EngineHost

    settings = engine_settings(opening)
    try:
        engine = Engine(opening.model, settings, device=opening.device)
    except RefoldError as error:
        if opening.is_lossless and str(error).startswith("drafts.depth:"):
            raise RefoldError("lossless: a model with exits or loops is required (this one has none)") from None
        if settings.exits is None or opening.tolerance is not None:
            raise
        # Nobody asked for these exits: thresholds from before more healing do not keep a model from being served.
        logger.warning("no exits are offered: %s", error)
        engine = Engine(opening.model, replace(settings, exits=None, exit_tolerance=None), device=opening.device)
    for name, source in opening.adapters.items():
        engine.add_adapters(name, source)
    return EngineHost(engine, wire.send)


def _tell_fault(wire: Wire, error: BaseException) -> None:
    from refold.modeling.load import is_out_of_memory
    from refold.serve.messages import Fault

    if isinstance(error, RefoldError):
        kind, message = type(error).__name__, str(error)
    elif is_out_of_memory(error):
        kind = "MemoryError"
        message = "memory: more is required than there is; lower --memory, --max-rows or --max-context, or free some"
        logger.error("the engine ran out of memory: %s", fold_error(error))
    else:
        kind, message = type(error).__name__, f"engine: it fails with {type(error).__name__}: {error}"
        logger.error("the engine fails: %s", fold_error(error))
    wire.send([Fault(error=kind, message=" ".join(message.split()))])


if __name__ == "__main__":
    main(int(sys.argv[1]))
