"""Settings of a server."""

from dataclasses import dataclass
from pathlib import Path

from refold.errors import RefoldError


@dataclass(frozen=True)
class ServeSettings:
    """Settings of one server.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0: a free one.
        api_keys: Keys of which every request under `/v1` must give one; empty: none is needed.
        max_queue: Most choices that wait for a row of the engine; more are answered with 429.
        max_total_tokens: Most tokens, prompts and continuations together, of all open requests; None: no limit.
        max_body: Most bytes of the body of a request.
        read_seconds: Time in which a request must have come, headers and body.
        write_seconds: Time in which a client must take some bytes of its answer.
        request_seconds: Time after which an open request is ended; None: no limit.
        drain_seconds: Time that open requests have to end after SIGTERM.
        watchdog_seconds: Time after which an engine that has work and tells nothing counts as hung; it must be longer
            than the longest step, which reads a piece of a prompt.

    Raises:
        RefoldError: A setting is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_queue: int = 64
    max_total_tokens: int | None = None
    max_body: int = 4 * 2**20
    read_seconds: float = 30.0
    write_seconds: float = 30.0
    request_seconds: float | None = 600.0
    drain_seconds: float = 30.0
    watchdog_seconds: float = 300.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise RefoldError(f"port: must lie in 0..65535 (got {self.port})")
        for name, least in (("max_queue", 0), ("max_total_tokens", 1), ("max_body", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RefoldError(f"{name}: at least {least} is required (got {value})")
        for name in ("read_seconds", "write_seconds", "request_seconds", "drain_seconds", "watchdog_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RefoldError(f"{name}: more than 0 seconds are required (got {value})")
        if not all(self.api_keys):
            raise RefoldError("api_keys: keys with at least one character are required (got an empty one)")


def read_keys(path: Path) -> tuple[str, ...]:
    """Reads a file of keys, one on each line; empty lines and lines that begin with # are dropped.

    Raises:
        RefoldError: The file cannot be read, or holds no key.
    """
    try:
        lines = [line.strip() for line in path.expanduser().read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RefoldError(f"api_key_file: a readable text file is required ({path}: {error})") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise RefoldError(f"api_key_file: at least one key is required ({path} holds none)")
    return keys
