"""Launching a server: engines in processes of their own, names for them, and HTTP in front."""

import asyncio
import contextlib
import gc
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from refold.checkpoint.locate import locate
from refold.errors import RefoldError
from refold.serve.engine_process import engine_settings
from refold.serve.labels import default_name, read_named, require_different, require_label
from refold.serve.line_log import LineLog, log_to_stderr, require_standard_streams
from refold.serve.messages import Open
from refold.serve.process_link import ProcessLink
from refold.serve.served import Role, ServedModel
from refold.serve.server import HttpServer, StopSignals, address_of, bind, is_public, serve_until_stopped
from refold.serve.settings import ServeSettings

if TYPE_CHECKING:
    from starlette.applications import Starlette

MakeApp = Callable[[Sequence[ServedModel], ServeSettings], "Starlette"]
"""Makes the HTTP application."""

TELL_SECONDS = 30.0
"""Time between two lines about an engine that is being opened."""

logger = logging.getLogger("refold.serve")


@dataclass(frozen=True)
class ServeLaunch:
    """All that is said about a server before it starts.

    Attributes:
        engine: What its engine opens.
        settings: Of the server.
        name: Of the model; None: its folder's name.
        adapters: Folders of adapters, with or without `NAME=`.
        against: Folder or hub id of a model to compare with, with or without `NAME=`; None: none.
        restart: Whether engines that stop are started again.
    """

    engine: Open
    settings: ServeSettings = field(default_factory=ServeSettings)
    name: str | None = None
    adapters: tuple[str, ...] = ()
    against: str | None = None
    restart: bool = False


def serve(launch: ServeLaunch, make: MakeApp | None = None) -> int:
    """Serves until a signal comes, or an engine stops for good.

    Args:
        launch: What to serve.
        make: Makes the application; None: refold's own.

    Returns:
        The exit status of the process: 0 after a signal, 1 after the loss of an engine.

    Raises:
        RefoldError: A setting does not fit, or the address is in use.
        SourceError: A model is missing or broken.
        FolderError: A folder is torn.
    """
    require_standard_streams()
    with log_to_stderr(launch.engine.log_level) as log:
        return asyncio.run(_serve(launch, make, log))


async def _serve(launch: ServeLaunch, make: MakeApp | None, log: LineLog) -> int:
    engines, settings = plan_engines(launch), launch.settings
    links = [_link(each.opening, launch) for each in engines]
    bound = bind(settings.host, settings.port)
    if is_public(bound) and not settings.api_keys:
        logger.warning(
            "anyone who reaches %s may use this server: give --api-key-file, or --host 127.0.0.1", address_of(bound)
        )
    with bound, StopSignals(links, log) as signals:
        try:
            models = await _until(signals, _start(engines, links))
            if models is None:
                return 0
            app = _find_app(make)(models, settings)

            def tell() -> None:
                # What has been made so far stays to the end: looking through it would stop all answers for a while.
                gc.freeze()
                with contextlib.suppress(OSError):
                    print(describe(models, address_of(bound)), flush=True)

            def stop() -> None:
                app.state.is_draining = True

            is_whole = await serve_until_stopped(HttpServer(app, settings), bound, signals, tell, stop)
            return 0 if is_whole else 1
        finally:
            await asyncio.gather(*(each.close() for each in links), return_exceptions=True)


@dataclass(frozen=True)
class PlannedEngine:
    """An engine of a server, before it runs.

    Attributes:
        name: Of its model.
        opening: What it opens.
        role: Of its model.
    """

    name: str
    opening: Open
    role: Role


def plan_engines(launch: ServeLaunch) -> list[PlannedEngine]:
    """Returns the engines of a server: one, and with `against` a second.

    Raises:
        RefoldError: A name is no label, or is used twice; settings exclude each other.
        SourceError: There is no such model.
        FolderError: A folder is torn.
    """
    opening = launch.engine
    if opening.is_lossless and opening.tolerance is not None:
        raise RefoldError("lossless: no --exits are required, because drafts take the full depth (got both)")
    name = require_label("name", launch.name) if launch.name is not None else default_name("name", opening.model)
    adapters = [read_named("adapters", text) for text in launch.adapters]
    source = None if launch.against is None else read_named("against", launch.against)
    require_different([name, *(label for label, _ in adapters), *([] if source is None else [source[0]])])
    for place in (opening.model, *(each for _, each in adapters), *([] if source is None else [source[1]])):
        locate(place)
    if source is not None and opening.threads is None:
        # Both answer at the same time, so each gets half of the processors.
        opening = opening.model_copy(update={"threads": max(1, (os.cpu_count() or 1) // 2)})
    engines = [PlannedEngine(name, opening.model_copy(update={"adapters": dict(adapters)}), "model")]
    if source is not None:
        plain = opening.model_copy(update={"model": source[1], "tolerance": None, "is_lossless": False})
        engines.append(PlannedEngine(source[0], plain, "source"))
    for engine in engines:
        engine_settings(engine.opening)  # a wrong setting is told before anything is opened
    return engines


def describe(models: Sequence[ServedModel], address: str) -> str:
    """Returns a line about a server that runs."""
    first = models[0]
    facts = first.link.facts
    told = [f"{address} serves {first.name}", facts.line.removeprefix("engine: ")]
    if facts.exit_depths:
        depths = ", ".join(map(str, facts.exit_depths))
        how = "the full depth unless a request asks" if not facts.tolerance else f"tolerance {facts.tolerance:g}"
        told.append(f"exits after {depths} of {facts.num_depths} depths, {how}")
    else:
        told.append(f"no exits, {facts.num_depths} depths")
    for each in models[1:]:
        told.append(f"{'adapters' if each.role == 'adapters' else 'beside it'} {each.name}")
    return "; ".join(told)


def _link(opening: Open, launch: ServeLaunch) -> ProcessLink:
    return ProcessLink(opening, restart=launch.restart, watchdog_seconds=launch.settings.watchdog_seconds)


async def _start(engines: Sequence[PlannedEngine], links: Sequence[ProcessLink]) -> list[ServedModel]:
    """Starts engines and returns their models. Tokenizers are loaded meanwhile.

    Engines start one after the other, because the second one takes its share of the memory that the first one leaves.
    """
    models: list[ServedModel] = []
    for engine, link in zip(engines, links, strict=True):
        opening = engine.opening
        logger.info("opening %s", opening.model)
        async with asyncio.TaskGroup() as group:
            telling = asyncio.create_task(_tell_opening(opening.model))
            starting = group.create_task(link.start())
            starting.add_done_callback(lambda _, telling=telling: telling.cancel())
            finding = group.create_task(asyncio.to_thread(_find_tokenizer, opening.model))
        tokenizer = finding.result()
        models.append(ServedModel(engine.name, link, tokenizer, role=engine.role))
        for name in opening.adapters:
            models.append(ServedModel(name, link, tokenizer, adapter=name, role="adapters"))
    return models


async def _tell_opening(model: str) -> None:
    """Writes from time to time that a model is still being opened: large ones take minutes, so nothing ends it."""
    begun = time.monotonic()
    while True:
        await asyncio.sleep(TELL_SECONDS)
        logger.info("still opening %s after %.0f s", model, time.monotonic() - begun)


async def _until(signals: StopSignals, starting: Coroutine[Any, Any, list[ServedModel]]) -> list[ServedModel] | None:
    """Returns what a start gives; None if a signal came first."""
    start = asyncio.create_task(starting)
    stop = asyncio.create_task(signals.received.wait())
    try:
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            return start.result()
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        return None
    except BaseExceptionGroup as group:
        # One mistake is enough for a line.
        raise _first_of(group) from None
    finally:
        stop.cancel()


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first


def _find_tokenizer(model: str) -> Any:
    # Engines are starting meanwhile: they need not wait for these imports.
    from refold.engine.intake import find_tokenizer

    return find_tokenizer(model)


def _find_app(make: MakeApp | None) -> MakeApp:
    if make is not None:
        return make
    from refold.serve.app import make_app

    return make_app
