"""Routes that answer with text: completions and chat."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from refold.generation.sampling import Sampling
from refold.serve.answer_shapes import Frame, make_frame, usage
from refold.serve.asking import Asking, ChoicePart, engine_lost
from refold.serve.bodies import ChatBody, CompletionBody, GenerationBody
from refold.serve.body_reader import read_body
from refold.serve.chat_answer import CHAT, CHAT_CHUNK, ChatWriter
from refold.serve.chat_messages import for_template
from refold.serve.completion_answer import COMPLETION, CompletionWriter
from refold.serve.event_stream import DONE, ClientGone, event, open_stream, until_gone
from refold.serve.faults import ApiFault
from refold.serve.forms import AnswerForm
from refold.serve.lineup import Lineup, ServedPlace
from refold.serve.meters import Meters, RequestMeter
from refold.serve.request_sampling import read_max_new_tokens, read_sampling, read_seed, require_known
from refold.serve.tool_plan import ToolPlan, plan_tools, read_form
from refold.serve.unused_fields import drop_unused

Write = Callable[[int, ChoicePart], dict[str, Any]]


class Prepared(NamedTuple):
    """A request whose prompts are tokens.

    Attributes:
        prompts: Tokens.
        whole: Name and writer of whole choices.
        chunk: Name and writer of pieces.
    """

    prompts: list[list[int]]
    whole: tuple[str, Write]
    chunk: tuple[str, Write]


class Wanted(NamedTuple):
    """A request before any work.

    Attributes:
        body: Its body.
        place: Its model.
        frame: What its chunks repeat.
        sampling: Its settings.
        form: Form that its answer is held to; None: any.
        num_prompts: Number of its prompts.
        wants_tokens: Whether its answer needs each token.
        prepare: Turns its prompts into tokens.
    """

    body: GenerationBody
    place: ServedPlace
    frame: Frame
    sampling: Sampling
    form: AnswerForm | None
    num_prompts: int
    wants_tokens: bool
    prepare: Callable[[], Awaitable[Prepared]]


class GenerationRoutes:
    """Answers requests for text.

    Args:
        lineup: The served models.
        meters: Where requests are counted.
        request_seconds: Time until a request is ended; None: no limit.
    """

    def __init__(self, lineup: Lineup, meters: Meters, request_seconds: float | None):
        self._lineup, self._meters, self._seconds = lineup, meters, request_seconds

    async def complete(self, request: Request) -> Response:
        """Answers `/v1/completions`."""
        body = await read_body(request, CompletionBody, lambda fields: drop_unused("completions", fields))
        place = self._open_place(request, body)
        form = read_form(body, ToolPlan())
        sampling = read_sampling(body, place.served.link.facts, form)

        async def prepare() -> Prepared:
            prompts = await _encoded(body, place)
            echoes = await _echoes(body, prompts, place) if body.echo else None
            writer = CompletionWriter(body, place.prompter, prompts, echoes)
            return Prepared(prompts, (COMPLETION, writer.choice), (COMPLETION, writer.choice))

        num_prompts = len(body.prompt) if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int) else 1
        wants_tokens = bool(body.return_tokens) or sampling.logprobs is not None
        frame = make_frame(place.served, "cmpl")
        return await self._answer(
            request, Wanted(body, place, frame, sampling, form, num_prompts, wants_tokens, prepare)
        )

    async def chat(self, request: Request) -> Response:
        """Answers `/v1/chat/completions`."""
        body = await read_body(request, ChatBody, lambda fields: drop_unused("chat", fields))
        place = self._open_place(request, body)
        plan = plan_tools(body, place.prompter.template)
        form = read_form(body, plan)
        sampling = read_sampling(body, place.served.link.facts, form)

        async def prepare() -> Prepared:
            ids = await place.prompter.encode_chat(for_template(body.messages), plan.options)
            writer = ChatWriter(body, place.prompter, plan)
            return Prepared([ids], (CHAT, writer.choice), (CHAT_CHUNK, writer.delta))

        wants_tokens = bool(body.return_tokens) or sampling.logprobs is not None or plan.kind is not None
        frame = make_frame(place.served, "chatcmpl")
        return await self._answer(request, Wanted(body, place, frame, sampling, form, 1, wants_tokens, prepare))

    def _open_place(self, request: Request, body: GenerationBody) -> ServedPlace:
        place = self._lineup.find(body.model)
        if request.app.state.is_draining:
            raise ApiFault(503, "server: it is closing", code="closing", headers={"retry-after": "5"})
        if place.served.link.failure is not None:
            raise engine_lost()
        if body.stream_options is not None and not body.stream:
            raise ApiFault(
                400,
                "stream_options: `stream` must be true (got options without it)",
                param="stream_options",
                code="contradiction",
            )
        return place

    async def _answer(self, request: Request, wanted: Wanted) -> Response:
        try:
            if wanted.body.stream:
                return await open_stream(request, self._events(wanted))
            return await until_gone(request.receive, self._whole(wanted))
        except ClientGone:
            return Response(status_code=499)

    async def _whole(self, wanted: Wanted) -> Response:
        choices: dict[int, ChoicePart] = {}
        async with self._asked(wanted) as (prepared, asking, meter):
            async for batch in asking.batches():
                meter.take(batch)
                for index, part in batch.items():
                    choices.setdefault(index, ChoicePart()).join(part)
        for index, choice in choices.items():
            choice.prompt = asking.ended[index // wanted.sampling.n].prompt_logprobs
        kind, write = prepared.whole
        answer = wanted.frame.around(kind, [write(index, choices[index]) for index in sorted(choices)])
        return JSONResponse(answer | {"usage": usage(prepared.prompts, asking)})

    async def _events(self, wanted: Wanted) -> AsyncGenerator[bytes, None]:
        options, frame = wanted.body.stream_options, wanted.frame
        has_usage = options is not None and bool(options.include_usage)
        extra: dict[str, Any] = {"usage": None} if has_usage else {}
        is_begun = False
        try:
            async with self._asked(wanted) as (prepared, asking, meter):
                kind, write = prepared.chunk
                async for batch in asking.batches():
                    meter.take(batch)
                    yield b"".join(event(frame.around(kind, [write(*each)]) | extra) for each in batch.items())
                    is_begun = True
        except ApiFault as fault:
            if is_begun:
                # Its status has been sent, so the application counts none.
                self._meters.reject(fault.reason)
            raise
        last = frame.around(kind, []) | {"usage": usage(prepared.prompts, asking)}
        yield (event(last) if has_usage else b"") + DONE

    @asynccontextmanager
    async def _asked(self, wanted: Wanted) -> AsyncIterator[tuple[Prepared, Asking, RequestMeter]]:
        """Lets a request in, turns its prompts into tokens and sends its jobs."""
        body, served, admission = wanted.body, wanted.place.served, wanted.place.admission
        num_choices = wanted.num_prompts * wanted.sampling.n
        with RequestMeter(self._meters, served.name) as meter, admission.admit(num_choices) as admitted:
            if wanted.form is not None:
                await self._lineup.threads.check_form(wanted.form)
            prepared = await wanted.prepare()
            room = read_max_new_tokens(body, prepared.prompts, served.link.facts)
            num_prompt_tokens = sum(map(len, prepared.prompts))
            admitted.take_tokens(num_prompt_tokens + num_choices * room)
            sampling = replace(wanted.sampling, max_new_tokens=room)
            asking = Asking(
                served,
                prepared.prompts,
                sampling,
                seed=read_seed(body),
                wants_tokens=wanted.wants_tokens,
                seconds=self._seconds,
                form=wanted.form,
            )
            async with asking:
                meter.begin(asking, num_prompt_tokens)
                yield prepared, asking, meter


async def _encoded(body: CompletionBody, place: ServedPlace) -> list[list[int]]:
    prompt: Any = body.prompt
    if isinstance(prompt, str):
        return await place.prompter.encode([prompt])
    if isinstance(prompt[0], str):
        return await place.prompter.encode(prompt)
    prompts = [prompt] if isinstance(prompt[0], int) else prompt
    require_known(prompts, place.served.link.facts)
    return prompts


async def _echoes(body: CompletionBody, prompts: list[list[int]], place: ServedPlace) -> list[str]:
    prompt: Any = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], str):
        return prompt
    return [await place.prompter.decode(each) for each in prompts]
