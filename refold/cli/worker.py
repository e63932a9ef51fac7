"""`refold worker`: a process that holds keys and values for an engine and computes attention."""

from typing import Annotated

import typer


def command(
    address: Annotated[
        str, typer.Option("--address", metavar="HOST:PORT", help="Where engines reach this host; port 0: a free one.")
    ],
    device: Annotated[str, typer.Option("--device", help="Device of keys and values.")] = "cpu",
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads of attention.")] = None,
    once: Annotated[bool, typer.Option("--once", help="End after the first engine.")] = False,
    owned: Annotated[bool, typer.Option("--owned", help="End when standard input closes.")] = False,
) -> None:
    """Hold a share of an engine's cache and compute attention on it. For trusted networks only."""
    from refold.engine.worker import serve

    serve(
        address,
        device=device,
        threads=threads,
        once=once,
        owned=owned,
        say=lambda bound: print(bound, flush=True),
    )
