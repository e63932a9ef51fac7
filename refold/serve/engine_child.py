"""An engine's process, seen from the server."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence

from refold.errors import RefoldError
from refold.serve.messages import WireMessage, read_from_engine, write_line

COMMAND = ("-m", "refold.serve.engine_process")
"""Arguments of Python; the descriptor of the socket follows."""
MOST_UNREAD = 64 * 2**20
"""Bytes of messages that the process may leave unread."""
MOST_LINE = 64 * 2**20
"""Most bytes of a message from the process."""
SHAPES_KEPT = {"LRU_CACHE_CAPACITY": "256", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}
"""Number of products, each for one number of rows, that PyTorch and oneDNN keep compiled. Their default of 1,024 takes
half a gigabyte in a server whose launches have all sizes; fewer than 256 cost time."""
ENDING = 5.0
"""Seconds that a process has to end by itself."""
_READ_BYTES = 1 << 18
_SOCKET_BYTES = 1 << 20


class EngineChild:
    """One run of an engine's process; `spawn` makes it.

    Attributes:
        process: The process.
    """

    def __init__(self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.process = process
        self._reader, self._writer = reader, writer
        self._rest: list[bytes] = []
        self._is_deaf = False

    @classmethod
    async def spawn(cls) -> "EngineChild":
        """Starts a process, which waits for an `Open`.

        Raises:
            RefoldError: The system starts none.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            for each in (ours, theirs):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, *COMMAND, str(theirs.fileno())),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    # What a library prints goes to the log.
                    stdout=2,
                    start_new_session=True,
                    env={**SHAPES_KEPT, **os.environ},
                )
            except OSError as error:
                ours.close()
                raise RefoldError(f"engine: a process that starts is required (the system says: {error})") from error
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(process, reader, writer)

    def write(self, message: WireMessage) -> None:
        """Sends a message, without waiting; one to a process that has ended is dropped."""
        if self._writer.is_closing():
            return
        self._writer.write(write_line(message))
        if self._writer.transport.get_write_buffer_size() > MOST_UNREAD:
            self._is_deaf = True
            self.kill()

    async def read(self) -> Sequence[WireMessage] | None:
        """Returns the next messages, at least one; None: there are no more. A cancelled call loses nothing.

        Raises:
            ValueError: The process sends something else.
        """
        while True:
            try:
                read = await self._reader.read(_READ_BYTES)
            except OSError:
                return None
            if not read:
                return None
            self._rest.append(read)
            if b"\n" in read:
                *lines, rest = b"".join(self._rest).split(b"\n")
                self._rest = [rest]
                return [read_from_engine(line) for line in lines]
            if sum(map(len, self._rest)) > MOST_LINE:
                raise ValueError("a message is too long")

    def kill(self) -> None:
        """Ends the process at once, if it has not ended."""
        self._writer.close()
        # It leads a session of its own, so nothing that it has started stays.
        if self.process.returncode is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                self.process.kill()

    async def end(self, seconds: float = ENDING) -> str:
        """Waits until the process has ended, kills it after a time, and returns how it ended."""
        try:
            async with asyncio.timeout(seconds):
                await self.process.wait()
        except TimeoutError:
            self.kill()
            await self.process.wait()
        finally:
            self._writer.close()
        status = self.process.returncode
        assert status is not None
        if self._is_deaf:
            return "it took no messages"
        if status == -signal.SIGKILL:
            return "it was killed, as a system does that runs out of memory"
        if status < 0:
            return f"it was ended by {signal.Signals(-status).name}"
        return f"it ended with status {status}"
