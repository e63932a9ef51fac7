"""The playground: a page that asks the server it comes from."""

import hashlib
from importlib.resources import files
from typing import NamedTuple

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from refold.pages.palette import DARK, LIGHT

INDEX = "index.html"
"""The file that `/` answers with."""
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
COLOURS = "colours.css"
"""Name of the style sheet that is written from the palette."""
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""The page loads its own files, talks to its own server, and is shown in no other page."""


class PageFile(NamedTuple):
    """One file of the page."""

    content: bytes
    media_type: str
    etag: str


def page_files() -> dict[str, PageFile]:
    """Returns the files of the page by name."""
    folder = files("refold.serve") / "page"
    found = {each.name: each.read_bytes() for each in folder.iterdir() if _ending(each.name) in MEDIA_TYPES}
    found[COLOURS] = _write_colours().encode()
    return {
        name: PageFile(content, MEDIA_TYPES[_ending(name)], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
        for name, content in sorted(found.items())
    }


def page_routes() -> list[Route]:
    """Returns the routes of the page: `/`, and `/page/` with the name of each other file."""
    found = page_files()
    return [_route("/" if name == INDEX else f"/page/{name}", each) for name, each in found.items()]


def _route(path: str, file: PageFile) -> Route:
    headers = {
        "ETag": file.etag,
        "Cache-Control": "no-cache",
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
    }

    async def answer(request: HttpRequest) -> Response:
        known = [each.strip().removeprefix("W/") for each in request.headers.get("If-None-Match", "").split(",")]
        if file.etag in known or known == ["*"]:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    return Route(path, answer, include_in_schema=False)


def _write_colours() -> str:
    lines = [f"  --{role}: light-dark({LIGHT[role]}, {DARK[role]});" for role in LIGHT]
    return "\n".join((":root {", "  color-scheme: light dark;", *lines, "}", ""))


def _ending(name: str) -> str:
    return "." + name.rpartition(".")[2]
