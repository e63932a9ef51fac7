"""`refold serve`: answering HTTP requests in the form of OpenAI's API."""

import os
from pathlib import Path

from refold.cli import options, serve_options


def command(
    model: options.Model,
    host: serve_options.Host = "127.0.0.1",
    port: serve_options.Port = 8000,
    name: serve_options.Name = None,
    api_key_file: serve_options.ApiKeyFile = None,
    max_queue: serve_options.MaxQueue = 64,
    max_total_tokens: serve_options.MaxTotalTokens = None,
    exits: serve_options.ExitTolerance = None,
    lossless: serve_options.Lossless = False,
    adapters: serve_options.ServedAdapters = None,
    against: serve_options.ServedAgainst = None,
    restart: serve_options.RestartEngine = False,
    weights: options.EngineWeights = "auto",
    max_rows: serve_options.MaxRows = None,
    max_context: serve_options.MaxContext = None,
    memory: serve_options.ServeMemory = None,
    device: options.Device = None,
    threads: serve_options.EngineThreads = None,
    drain_seconds: serve_options.DrainSeconds = 30.0,
    watchdog_seconds: serve_options.WatchdogSeconds = 300.0,
    log_level: serve_options.LogLevel = "info",
) -> None:
    """Serve a model over HTTP: OpenAI's API, metrics, and a page to try it."""
    serve_options.require_extra()
    from refold.serve.launch import ServeLaunch, serve
    from refold.serve.messages import Open
    from refold.serve.settings import ServeSettings, read_keys

    opening = Open(
        model=model,
        weights=weights,
        memory=memory,
        max_rows=max_rows,
        max_context=max_context,
        threads=threads,
        device=device,
        tolerance=exits,
        is_lossless=lossless,
        log_level=log_level,
    )
    settings = ServeSettings(
        host=host,
        port=port,
        api_keys=() if api_key_file is None else read_keys(Path(api_key_file)),
        max_queue=max_queue,
        max_total_tokens=max_total_tokens,
        drain_seconds=drain_seconds,
        watchdog_seconds=watchdog_seconds,
    )
    status = serve(ServeLaunch(opening, settings, name, tuple(adapters or ()), against, restart))
    # All is closed and written; tearing down torch and its threads would take seconds more on a busy machine.
    os._exit(status)
