"""`refold generate`: continue a text."""

import sys
from typing import Annotated

import typer

from refold.cli import options


def command(
    model: options.Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; `-` reads standard input.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message: apply the chat template.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="At most so many tokens. Left out: 128.")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    adapters: Annotated[
        str | None, typer.Option(help="Folder healed from MODEL with `--protocol domain`: its adapters instead.")
    ] = None,
    exit_depth: Annotated[int | None, typer.Option(help="Run only so many depths.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Continue a prompt with a folded model, or with a source."""
    from refold.engine.generate import TextGenerator
    from refold.engine.sampling import Sampling
    from refold.modeling.adapters import load_adapters

    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    generator = TextGenerator(model, dtype=dtype, device=device)
    if adapters is not None:
        load_adapters(generator.model, adapters)
    if stream:
        for piece in generator.stream(text, sampling, chat=chat, exit_depth=exit_depth):
            print(piece, end="", flush=True)
        print()
    else:
        print(generator.generate([text], sampling, chat=chat, exit_depth=exit_depth)[0])
