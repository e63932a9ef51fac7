"""Routes that tell about the server, its models and their tokens."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from refold.serve.bodies import DetokenizeBody, TokenizeBody
from refold.serve.body_reader import read_body
from refold.serve.chat_messages import for_template
from refold.serve.faults import ApiFault, without_paths
from refold.serve.lineup import Lineup, ServedPlace
from refold.serve.link import EngineLink
from refold.serve.request_sampling import require_known
from refold.version import __version__


class InformationRoutes:
    """Answers requests for anything but text.

    Args:
        lineup: The served models.
    """

    def __init__(self, lineup: Lineup):
        self._lineup = lineup

    async def models(self, _: Request) -> Response:
        """Answers `/v1/models`."""
        return JSONResponse({"object": "list", "data": [_card(each) for each in self._lineup.places.values()]})

    async def model(self, request: Request) -> Response:
        """Answers `/v1/models/{name}`."""
        return JSONResponse(_card(self._lineup.find(request.path_params["name"])))

    async def embeddings(self, _: Request) -> Response:
        """Answers `/v1/embeddings`: the served models have none."""
        raise ApiFault(
            404,
            "embeddings: not offered, because the hidden states of a model that predicts the next token are not "
            "trained to be compared; use a model made for embeddings",
            code="no_embeddings",
        )

    async def tokenize(self, request: Request) -> Response:
        """Answers `/tokenize`."""
        body = await read_body(request, TokenizeBody)
        place = self._lineup.find(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiFault(
                400, "prompt: either `prompt` or `messages` is required", param="prompt", code="contradiction"
            )
        if body.prompt is not None:
            tokens = (await place.prompter.encode([body.prompt]))[0]
        else:
            tokens = await place.prompter.encode_chat(for_template(body.messages or []), {})
        return JSONResponse(
            {
                "tokens": tokens,
                "texts": [place.prompter.piece(each)[0] for each in tokens],
                "count": len(tokens),
                "max_model_len": place.served.link.facts.max_context,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        """Answers `/detokenize`."""
        body = await read_body(request, DetokenizeBody)
        place = self._lineup.find(body.model)
        require_known([body.tokens], place.served.link.facts, "tokens")
        return JSONResponse({"prompt": await place.prompter.decode(body.tokens)})

    async def health(self, _: Request) -> Response:
        """Answers `/health`: 503 where an engine is lost."""
        lost = {name: link.failure for link, name in self._lineup.links.items() if link.failure is not None}
        if lost:
            reason = "; ".join(f"{name}: {without_paths(text)}" for name, text in lost.items())
            raise ApiFault(503, f"engine: a running engine is required ({reason})", code="engine_lost")
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Answers `/ready`: 503 where requests are not taken."""
        if request.app.state.is_draining:
            raise ApiFault(503, "server: it is closing", code="closing")
        return await self.health(request)

    async def version(self, _: Request) -> Response:
        """Answers `/version`."""
        return JSONResponse({"version": __version__})

    async def state(self, _: Request) -> Response:
        """Answers `/state`: what a page about the server shows, several times a second."""
        return JSONResponse(
            {
                "models": [_model_state(each) for each in self._lineup.places.values()],
                "engines": {name: _engine_state(link) for link, name in self._lineup.links.items()},
            }
        )


def _card(place: ServedPlace) -> dict[str, Any]:
    served, facts = place.served, place.served.link.facts
    return {
        "id": served.name,
        "object": "model",
        "created": place.created,
        "owned_by": "refold",
        "max_model_len": facts.max_context,
        "parameters": facts.parameters,
        "weight_bytes": facts.weight_bytes,
        "depths": facts.num_depths,
        "exit_depths": list(facts.exit_depths),
        "role": served.role,
    }


def _model_state(place: ServedPlace) -> dict[str, Any]:
    served, facts = place.served, place.served.link.facts
    return {
        "name": served.name,
        "role": served.role,
        "line": without_paths(facts.line),
        "depths": facts.num_depths,
        "exit_depths": list(facts.exit_depths),
        "tolerances": list(facts.tolerances),
        "tolerance": facts.tolerance,
        "weight_bytes": facts.weight_bytes,
        "parameters": facts.parameters,
        "max_context": facts.max_context,
        "has_chat": bool(place.prompter.template),
        "num_pages": facts.num_pages,
        "page_size": facts.page_size,
        "max_rows": facts.max_rows,
        "engine": place.engine,
    }


def _engine_state(link: EngineLink) -> dict[str, Any]:
    state = link.state
    if state is None:
        return {}
    return {
        "waiting": state.waiting,
        "running": state.running,
        "used_pages": state.used_pages,
        "free_pages": state.free_pages,
        "new_tokens": state.new_tokens,
        "slots": [{"first_depth": each.first_depth, "rows": each.rows} for each in state.slots],
        "depths": {str(depth): tokens for depth, tokens in sorted(state.depths.items())},
        "acceptance": state.acceptance,
    }
