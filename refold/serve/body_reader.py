"""Bytes of a request as a checked body."""

import asyncio
import re
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from refold.recipe.mistakes import describe_mistakes
from refold.serve.faults import ApiFault
from refold.suggest import shorten

Read = TypeVar("Read", bound=BaseModel)
_MAX_TOLD = 8
_CHARSET = re.compile(r";\s*charset\s*=\s*\"?([^\s;\"]+)", re.IGNORECASE)
_LARGE = 64 * 1024
"""Bytes of a body above which a thread checks it: the check of megabytes takes a tenth of a second."""


async def read_body(
    request: Request, kind: type[Read], prepare: Callable[[dict[str, Any]], None] | None = None
) -> Read:
    """Reads the body of a request.

    Args:
        request: The request.
        kind: What is required.
        prepare: Takes fields away before the check.

    Raises:
        ApiFault: It is of another type, no JSON, or not what is required; all mistakes are told.
    """
    media = request.headers.get("content-type", "")
    if media.partition(";")[0].strip().lower() != "application/json":
        raise ApiFault(
            415,
            f"content-type: application/json is required (got {shorten(media[:80]) if media else 'none'})",
            code="unsupported_media_type",
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiFault(
            415,
            f"content-encoding: a body that is not compressed is required (got {shorten(encoding[:80])})",
            code="unsupported_media_type",
        )
    charset = _CHARSET.search(media)
    if charset is not None and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise ApiFault(
            415,
            f"content-type: the charset utf-8 is required (got {shorten(charset[1][:80])})",
            code="unsupported_media_type",
        )
    raw = await request.body()
    if len(raw) <= _LARGE:
        return _checked(raw, kind, prepare)
    return await asyncio.to_thread(_checked, raw, kind, prepare)


def _checked(raw: bytes, kind: type[Read], prepare: Callable[[dict[str, Any]], None] | None) -> Read:
    try:
        fields = from_json(raw, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise ApiFault(400, f"body: valid JSON is required ({str(error)[:200]})", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiFault(400, f"body: a JSON object is required (got {shorten(fields)})", code="invalid_json")
    if prepare is not None:
        prepare(fields)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        lines = describe_mistakes(error, kind)
        told = "; ".join(lines[:_MAX_TOLD]) + (f"; and {len(lines) - _MAX_TOLD} more" if len(lines) > _MAX_TOLD else "")
        is_unknown = error.errors(include_url=False, include_input=False)[0]["type"] == "extra_forbidden"
        code = "unknown_parameter" if is_unknown else "invalid_value"
        raise ApiFault(400, told, param=lines[0].partition(":")[0], code=code) from None
