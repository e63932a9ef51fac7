"""The HTTP application: routes over engines that run elsewhere."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from refold.serve.faults import ApiFault
from refold.serve.gate import RequestGate
from refold.serve.generation_routes import GenerationRoutes
from refold.serve.information_routes import InformationRoutes
from refold.serve.lineup import Lineup
from refold.serve.meters import Meters
from refold.serve.openapi import make_document
from refold.serve.playground import page_routes
from refold.serve.served import ServedModel
from refold.serve.settings import ServeSettings


def make_app(models: Sequence[ServedModel], settings: ServeSettings) -> Starlette:
    """Returns the application that serves models; their links must have been started before its first request.

    Args:
        models: Names that requests may ask for; the first one is the main model.
        settings: Of the server.

    Returns:
        The application; `app.state.is_draining` is set where no new requests shall be taken.
    """
    lineup = Lineup(models, settings)
    meters = Meters(lineup.links)
    generation = GenerationRoutes(lineup, meters, settings.request_seconds)
    information = InformationRoutes(lineup)

    async def metrics(_: Request) -> Response:
        return Response(meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    document = make_document(list(lineup.places), bool(settings.api_keys))

    async def openapi(_: Request) -> Response:
        return JSONResponse(document)

    async def answer_fault(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiFault)
        meters.reject(error.reason)
        return error.response()

    routes: list[BaseRoute] = [
        Route("/v1/completions", generation.complete, methods=["POST"]),
        Route("/v1/chat/completions", generation.chat, methods=["POST"]),
        Route("/v1/embeddings", information.embeddings, methods=["POST"]),
        Route("/v1/models", information.models, methods=["GET"]),
        Route("/v1/models/{name}", information.model, methods=["GET"]),
        Route("/tokenize", information.tokenize, methods=["POST"]),
        Route("/detokenize", information.detokenize, methods=["POST"]),
        *page_routes(),
        Route("/health", information.health, methods=["GET"]),
        Route("/ready", information.ready, methods=["GET"]),
        Route("/version", information.version, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
        Route("/state", information.state, methods=["GET"]),
    ]

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        lineup.threads.close()

    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(RequestGate, settings=settings, count_rejection=meters.reject)],
        exception_handlers={HTTPException: _answer_http_error, ApiFault: answer_fault},
    )
    app.router.redirect_slashes = False
    app.state.lineup = lineup
    app.state.is_draining = False
    return app


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    headers: Any = error.headers
    if error.status_code == 404:
        return ApiFault(404, f"path: must be a route of this server (got {path}); see /openapi.json").response()
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"method: must be one of {allowed} for {path} (got {request.method[:20]})"
        return ApiFault(405, message, code="method_not_allowed", headers=headers).response()
    return ApiFault(error.status_code, str(error.detail), headers=headers).response()
