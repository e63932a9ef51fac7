"""A small application over an engine, for tests of what stands below the routes, and a server of it as a script.

`python tests/serve/small_app.py MODEL [NAME=VALUE ...]`: `read_seconds=2`, `restart=1`, `max_rows=4`, ... With `odd=1`
its engine is `odd_engine.py`.
"""

import json
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from refold.generation.sampling import Sampling
from refold.serve import engine_child
from refold.serve.launch import ServeLaunch, serve
from refold.serve.link import EngineLostError
from refold.serve.messages import Open
from refold.serve.served import ServedModel
from refold.serve.settings import ServeSettings


def make_small_app(models: Sequence[ServedModel], _: ServeSettings) -> Starlette:
    """`POST /generate` streams JSON lines, `GET /health` says how the engine is, `GET /bytes?n=` answers n bytes."""
    link = models[0].link

    async def generate(request: Request) -> Response:
        body = json.loads(await request.body())
        sampling = Sampling(max_new_tokens=body.get("tokens", 16), ignore_eos=True)

        async def lines() -> AsyncIterator[str]:
            try:
                async with link.answer(body.get("prompt", (1, 2, 3)), sampling, wants_tokens=True) as answer:
                    async for part in answer.parts():
                        yield json.dumps({"text": part.text, "token": part.token and part.token.token}) + "\n"
                yield json.dumps({"end": answer.ended.choices[0].reason if answer.ended else None}) + "\n"
            except EngineLostError as error:
                yield json.dumps({"error": str(error)}) + "\n"

        return StreamingResponse(lines(), media_type="application/jsonl")

    async def health(_: Request) -> Response:
        pids = {each.name: each.link.pid for each in models}  # type: ignore[attr-defined]
        state = link.state.model_dump() if link.state else None
        told = {"failure": link.failure, "pids": pids, "state": state, "open": link.num_open}
        return JSONResponse(told, 200 if link.failure is None else 503)

    async def many_bytes(request: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(int(request.query_params["n"]) // 65536):
                yield b"x" * 65536

        return StreamingResponse(chunks(), media_type="text/plain")

    async def upload(request: Request) -> Response:
        return JSONResponse({"bytes": len(await request.body())})

    return Starlette(
        routes=[
            Route("/generate", generate, methods=["POST"]),
            Route("/health", health),
            Route("/bytes", many_bytes),
            Route("/upload", upload, methods=["POST"]),
        ]
    )


def main() -> int:
    """Serves what the arguments say."""
    pairs = [each.partition("=") for each in sys.argv[2:]]
    given: dict[str, Any] = {name: json.loads(value) for name, _, value in pairs}
    if given.pop("odd", False):
        engine_child.COMMAND = (str(Path(__file__).parent / "odd_engine.py"),)
    opening = {name: given.pop(name) for name in Open.model_fields if name in given}
    launch = {name: given.pop(name) for name in ("name", "adapters", "against", "restart") if name in given}
    settings = ServeSettings(**{"port": 0, **given})
    return serve(ServeLaunch(Open(model=sys.argv[1], **opening), settings, **launch), make_small_app)


if __name__ == "__main__":
    sys.exit(main())
