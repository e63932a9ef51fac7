"""The outermost layer: request ids, keys, the size of bodies, and faults that are ours."""

import hashlib
import hmac
import logging
import re
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from refold.serve.faults import ApiFault, new_request_id
from refold.serve.settings import ServeSettings

logger = logging.getLogger(__name__)
KEYED = ("/v1", "/state", "/metrics", "/tokenize", "/detokenize")
"""Paths that need a key where keys are set, with all below them."""
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


class RequestGate:
    """Stands before the application.

    Every answer carries `X-Request-Id`: the client's, if it is printable and at most 128 characters, or a new one.

    Args:
        app: The application.
        settings: Keys and the limit for bodies.
        count_rejection: Gets the reason of each request that is turned away here.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, count_rejection: Callable[[str], None]):
        self._app, self._max_body = app, settings.max_body
        self._keys = [_digest(key.encode()) for key in settings.api_keys]
        self._count = count_rejection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        is_begun = False

        async def answer(message: Message) -> None:
            nonlocal is_begun
            if message["type"] == "http.response.start":
                is_begun = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._require_key(scope["path"], headers)
            await self._app(scope, self._limited(headers, receive), answer)
        except ApiFault as fault:
            if is_begun:
                raise
            self._count(fault.reason)
            await fault.response()(scope, receive, answer)
        except ClientDisconnect:
            # Nobody waits for an answer.
            return
        except Exception:
            # Whatever is not a fault of the request is one of ours, of any kind; the traceback stays in the log.
            logger.exception("request %s failed", request_id)
            self._count("internal_error")
            if is_begun:
                raise
            fault = ApiFault(500, f"server: an internal error occurred (request {request_id})", code="internal_error")
            await fault.response()(scope, receive, answer)

    def _require_key(self, path: str, headers: Headers) -> None:
        if not self._keys or not any(path == each or path.startswith(each + "/") for each in KEYED):
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode("latin-1"))  # as Starlette decodes the bytes of headers
        # Every key is compared, so that the time tells nothing.
        matches = [hmac.compare_digest(given, each) for each in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            got = "a wrong one" if key else "none"
            raise ApiFault(
                401,
                f"authorization: a key of this server is required, as `Authorization: Bearer KEY` (got {got})",
                code="invalid_api_key",
                headers={"www-authenticate": 'Bearer realm="refold"'},
            )

    def _limited(self, headers: Headers, receive: Receive) -> Receive:
        told = headers.get("content-length", "")
        if told.isdecimal() and int(told[:20]) > self._max_body:
            raise self._too_large(told[:20])
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body:
                raise self._too_large(f"more than {num_bytes - 1}")
            return message

        return limited

    def _too_large(self, got: str) -> ApiFault:
        return ApiFault(
            413,
            f"body: must be at most {self._max_body:,} bytes (got {got})",
            code="body_too_large",
            headers={"connection": "close"},
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
