"""Answers to requests that fail: one shape of error for every status."""

import re
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}
_MAX_MESSAGE = 2000
_PATH = re.compile(r"(?<![\w/.:])(?:~|\.{1,2})?(?:/[\w.\-+@]+){2,}/?")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")


class ApiFault(Exception):
    """An error that a client is told.

    Args:
        status: HTTP status.
        message: `field: what is required (got what)`.
        param: The field at fault.
        code: A name that programs can compare.
        headers: Further headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message[:_MAX_MESSAGE], param, code
        self.headers = dict(headers or {})

    @property
    def reason(self) -> str:
        """The name under which it is counted: its code, or its status where it has none."""
        return self.code or str(self.status)

    def body(self) -> dict[str, Any]:
        """Returns the error object, in the shape that OpenAI's clients read."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Returns the answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def new_request_id() -> str:
    """Returns a name for a request that brings none."""
    return f"req-{uuid.uuid4().hex}"


def without_paths(text: str) -> str:
    """Returns the first line of a message, without paths and memory addresses."""
    lines = text.strip().splitlines() or [""]
    return _ADDRESS.sub("...", _PATH.sub("...", lines[0]))[:300]


def field_fault(error: Exception, names: Mapping[str, str] | None = None) -> ApiFault:
    """Returns the fault of a mistake that a setting's own check found.

    Args:
        error: Its message begins with the setting and a colon.
        names: Setting to the field of the request it came from, where they differ.
    """
    message = without_paths(str(error))
    setting, colon, rest = message.partition(":")
    if not colon or not re.fullmatch(r"[a-z_][a-z_.\[\]0-9]*", setting):
        return ApiFault(400, message)
    field = (names or {}).get(setting, setting)
    return ApiFault(400, f"{field}:{rest}", param=field, code="invalid_value")
