"""Requests that are let in, before any work is done for them."""

from refold.serve.faults import ApiFault
from refold.serve.link import EngineLink

RETRY_SECONDS = 1
"""Told to those who are turned away."""


class Admission:
    """Counts choices and tokens of open requests of one engine.

    Args:
        link: The engine.
        max_queue: Most choices beyond its rows.
        max_total_tokens: Most tokens of all open requests; None: no limit.
    """

    def __init__(self, link: EngineLink, max_queue: int, max_total_tokens: int | None):
        self._link, self._max_queue, self._max_tokens = link, max_queue, max_total_tokens
        self.num_choices = 0
        self.num_tokens = 0

    def admit(self, num_choices: int) -> "Admitted":
        """Lets a request in, as a context manager.

        Raises:
            ApiFault: There is no room, now or ever.
        """
        most = self._link.facts.max_rows + self._max_queue
        if num_choices > most:
            raise ApiFault(
                400,
                f"n: must be at most {most} choices of all prompts together on this server (got {num_choices})",
                param="n",
                code="too_many_choices",
            )
        if self.num_choices + num_choices > most:
            raise _busy(
                f"server: at most {most} open choices are allowed (got {self.num_choices + num_choices})", "queue_full"
            )
        return Admitted(self, num_choices)

    def check_tokens(self, num_tokens: int) -> None:
        """Checks that more tokens have room.

        Raises:
            ApiFault: They have none, now or ever.
        """
        if self._max_tokens is None:
            return
        if num_tokens > self._max_tokens:
            raise ApiFault(
                400,
                f"prompt: prompts and new tokens must be at most {self._max_tokens} tokens together on this server "
                f"(got {num_tokens})",
                param="prompt",
                code="too_many_tokens",
            )
        if self.num_tokens + num_tokens > self._max_tokens:
            raise _busy(
                f"server: at most {self._max_tokens} tokens of open requests are allowed "
                f"(got {self.num_tokens + num_tokens})",
                "tokens_full",
            )


class Admitted:
    """The room of one request; leaving it gives the room back."""

    def __init__(self, admission: Admission, num_choices: int):
        self._admission, self._num_choices, self._num_tokens = admission, num_choices, 0

    def __enter__(self) -> "Admitted":
        self._admission.num_choices += self._num_choices
        return self

    def __exit__(self, *_: object) -> None:
        self._admission.num_choices -= self._num_choices
        self._admission.num_tokens -= self._num_tokens

    def take_tokens(self, num_tokens: int) -> None:
        """Takes room for tokens.

        Raises:
            ApiFault: There is none, now or ever.
        """
        self._admission.check_tokens(num_tokens)
        self._num_tokens += num_tokens
        self._admission.num_tokens += num_tokens


def _busy(message: str, code: str) -> ApiFault:
    return ApiFault(429, message + "; ask again later", code=code, headers={"retry-after": str(RETRY_SECONDS)})
