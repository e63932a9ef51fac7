"""Options of `refold serve` and `refold chat`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from refold.cli.options import amount, real, whole
from refold.errors import RefoldError

EXTRA = ("starlette", "uvicorn", "prometheus_client", "llguidance")
"""Modules of the extra `serve`."""

Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")]
Port = Annotated[int, typer.Option(parser=whole(0), metavar="N", help="Port to listen on; 0: a free one.")]
Name = Annotated[str | None, typer.Option(help="Name that requests ask for. Default: the folder's name.")]
ApiKeyFile = Annotated[
    Path | None, typer.Option(help="File of keys, one a line; requests under /v1 must then give one of them.")
]
MaxQueue = Annotated[
    int, typer.Option(parser=whole(0), metavar="N", help="Most answers that wait; further requests get status 429.")
]
MaxTotalTokens = Annotated[
    int | None,
    typer.Option(parser=amount, metavar="AMOUNT", help="Most tokens of all open requests, prompts included."),
]
ExitTolerance = Annotated[
    float | None,
    typer.Option(
        "--exits",
        parser=real,
        metavar="TOLERANCE",
        help="Let tokens leave at exits: share of tokens that may differ, from `refold calibrate`.",
    ),
]
Lossless = Annotated[
    bool, typer.Option("--lossless", help="An exit, or the first loop, drafts tokens; the text stays the same.")
]
ServedAdapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapters", metavar="DIR", help="Adapters of the same block as a model of their own; NAME=DIR. Repeatable."
    ),
]
ServedAgainst = Annotated[
    str | None, typer.Option("--against", metavar="SOURCE", help="Also serve this model, such as the source; NAME=DIR.")
]
RestartEngine = Annotated[bool, typer.Option("--restart", help="Start the engine again if it ends.")]
MaxRows = Annotated[
    int | None, typer.Option(parser=whole(1), metavar="N", help="Most answers that run at once. Default: 32.")
]
MaxContext = Annotated[
    int | None,
    typer.Option(parser=whole(2), metavar="N", help="Most tokens of prompt and answer. Default: the model's."),
]
ServeMemory = Annotated[
    int | None,
    typer.Option(
        parser=amount, metavar="BYTES", help="For keys, values and states, such as 500M. Default: half of what is free."
    ),
]
EngineThreads = Annotated[
    int | None, typer.Option(parser=whole(1), metavar="N", help="CPU threads of the engine. Default: all.")
]
DrainSeconds = Annotated[
    float, typer.Option(parser=real, metavar="X", help="Time that open answers have to end after SIGTERM or Ctrl-C.")
]
WatchdogSeconds = Annotated[
    float, typer.Option(parser=real, metavar="X", help="Time after which a silent engine with work counts as hung.")
]
LogLevel = Annotated[str, typer.Option(help="debug (with a line for each request), info, warning or error.")]

Partner = Annotated[
    str, typer.Argument(metavar="[URL|MODEL]", help="A running server, or a folder or hub id to open here.")
]
ChatName = Annotated[str | None, typer.Option("--name", help="Model of the server. Default: its first.")]
ChatKeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", help="File with the server's key. Default: $REFOLD_API_KEY.")
]
System = Annotated[str | None, typer.Option("--system", help="System message that begins the conversation.")]


def require_extra() -> None:
    """Checks that the packages of the extra `serve` are there.

    Raises:
        RefoldError: One is missing.
    """
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise RefoldError(f"serve: the package {missing[0]} is required (not installed); pip install 'refold[serve]'")
