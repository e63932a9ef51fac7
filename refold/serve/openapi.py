"""The OpenAPI document, made from the bodies of requests and answers."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from refold.fields import describe_fields
from refold.serve.answer_bodies import (
    AnswerPart,
    ChatAnswer,
    CompletionAnswer,
    DetokenizeAnswer,
    ErrorAnswer,
    HealthAnswer,
    ModelCard,
    ModelList,
    StateAnswer,
    TokenizeAnswer,
    VersionAnswer,
)
from refold.serve.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from refold.serve.chat_messages import RequestPart
from refold.serve.unused_fields import IGNORED, REFUSED, Endpoint
from refold.version import __version__

_STATUSES = {
    400: "A field is missing, unknown, out of range, or not supported; or the prompt is too long.",
    401: "No key of this server was given.",
    404: "There is no such model, or it is not offered.",
    408: "The request took too long to come.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The server is full; `Retry-After` says when to ask again.",
    431: "The headers are too large.",
    500: "A fault of the server; the request id finds it in the log.",
    503: "The engine has stopped, or the server is closing.",
    504: "The request was not done in time.",
}
_READ = (400, 401, 404, 408, 413, 415, 431, 500, 503)
_GENERATION = (*_READ, 429, 504)


class _Route(NamedTuple):
    path: str
    method: str
    summary: str
    body: type[BaseModel] | None
    answer: type[BaseModel] | str | None
    statuses: tuple[int, ...]
    is_open: bool = False


_ROUTES = (
    _Route("/v1/completions", "post", "Continue prompts", CompletionBody, CompletionAnswer, _GENERATION),
    _Route("/v1/chat/completions", "post", "Answer a conversation", ChatBody, ChatAnswer, _GENERATION),
    _Route("/v1/embeddings", "post", "Not offered", None, None, (401, 404, 408, 413, 431, 500)),
    _Route("/v1/models", "get", "List the served models", None, ModelList, (401, 408, 431, 500)),
    _Route("/v1/models/{name}", "get", "Tell about one model", None, ModelCard, (401, 404, 408, 431, 500)),
    _Route("/tokenize", "post", "Turn a text or a conversation into tokens", TokenizeBody, TokenizeAnswer, _READ),
    _Route("/detokenize", "post", "Turn tokens into text", DetokenizeBody, DetokenizeAnswer, _READ),
    _Route("/health", "get", "Say whether the engines run", None, HealthAnswer, (408, 431, 500, 503), True),
    _Route("/ready", "get", "Say whether requests are taken", None, HealthAnswer, (408, 431, 500, 503), True),
    _Route("/version", "get", "Tell the version", None, VersionAnswer, (408, 431, 500), True),
    _Route("/metrics", "get", "Numbers for Prometheus", None, "text/plain", (401, 408, 431, 500)),
    _Route("/state", "get", "State of models and engines", None, StateAnswer, (401, 408, 431, 500)),
)


def make_document(models: Sequence[str], has_keys: bool) -> dict[str, Any]:
    """Returns the document of a server.

    Args:
        models: Names of the served models.
        has_keys: Whether requests need a key.
    """
    bodies = [each.body for each in _ROUTES if each.body is not None]
    answers = [each.answer for each in _ROUTES if isinstance(each.answer, type)]
    _, given = models_json_schema(
        [(each, "validation") for each in dict.fromkeys([*bodies, *answers, ErrorAnswer])],
        ref_template="#/components/schemas/{model}",
    )
    schemas = given["$defs"]
    for model in _subclasses(AnswerPart, RequestPart):
        properties = schemas.get(model.__name__, {}).get("properties", {})
        for name, text in describe_fields(model).items():
            field = model.model_fields[name].alias or name
            if field in properties:
                properties[field].setdefault("description", text)
    for body in bodies:
        schemas[body.__name__]["properties"]["model"]["enum"] = list(models)
    endpoints: tuple[tuple[type[BaseModel], Endpoint], ...] = ((CompletionBody, "completions"), (ChatBody, "chat"))
    for body, endpoint in endpoints:
        schemas[body.__name__]["properties"] |= _unused(endpoint)
    components: dict[str, Any] = {"schemas": schemas}
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    paths: dict[str, Any] = {}
    for route in _ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route, has_keys, models)
    return {
        "openapi": "3.1.0",
        "info": {"title": "refold", "version": __version__, "description": "Serves models in OpenAI's shapes."},
        "paths": paths,
        "components": components,
    }


def _subclasses(*bases: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for base in bases:
        yield from base.__subclasses__()
        yield from _subclasses(*base.__subclasses__())


def _unused(endpoint: Endpoint) -> dict[str, Any]:
    ignored = {name: {"description": f"Taken and without effect: {reason}."} for name, reason in IGNORED.items()}
    refused = {
        name: {"enum": [*unused.harmless, None], "description": f"Other values are refused: {unused.reason}."}
        for name, unused in REFUSED[endpoint].items()
    }
    return ignored | refused


def _operation(route: _Route, has_keys: bool, models: Sequence[str]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method}{route.path}".replace("/", "_").replace("{", "").replace("}", ""),
        "responses": {str(status): _error(status) for status in sorted(route.statuses) if has_keys or status != 401},
    }
    if route.answer is not None:
        operation["responses"]["200"] = {"description": "Done.", "content": _content(route)}
    if route.body is not None:
        schema = {"$ref": f"#/components/schemas/{route.body.__name__}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if "{name}" in route.path:
        schema = {"type": "string", "enum": list(models)}
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": schema}]
    if has_keys and not route.is_open:
        operation["security"] = [{"key": []}]
    return operation


def _content(route: _Route) -> dict[str, Any]:
    if isinstance(route.answer, str):
        return {route.answer: {"schema": {"type": "string"}}}
    assert route.answer is not None
    content: dict[str, Any] = {
        "application/json": {"schema": {"$ref": f"#/components/schemas/{route.answer.__name__}"}}
    }
    if route.answer in (CompletionAnswer, ChatAnswer):
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return content


def _error(status: int) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "description": _STATUSES[status],
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}},
    }
    if status == 429:
        answer["headers"] = {"Retry-After": {"schema": {"type": "string"}}}
    return answer
