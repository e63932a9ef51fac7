"""`refold generate`: continue a text."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from refold.cli import options
from refold.cli.show import format_bytes, note, progress


def command(
    model: options.Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue; `-` reads standard input.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message: apply the chat template.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="At most so many tokens. Left out: 128.")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    save_state: Annotated[
        Path | None, typer.Option(help="Read the prompt, write what the model remembers to this file, and stop.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Go on from what --save-state wrote; the prompt is what follows, if anything.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older state file.")] = False,
    adapters: Annotated[
        str | None, typer.Option(help="Folder healed from MODEL with `--protocol domain`: its adapters instead.")
    ] = None,
    exit_depth: Annotated[int | None, typer.Option(help="Run only so many depths.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Continue a prompt with a folded model, or with a source."""
    from refold.errors import RefoldError
    from refold.generation.generate import TextGenerator
    from refold.generation.sampling import Sampling
    from refold.generation.state import require_free
    from refold.modeling.adapters import load_adapters

    if prompt is None and state is None:
        raise RefoldError("prompt: a text to continue is required (got none); give --prompt, or --state to go on")
    text = sys.stdin.read() if prompt == "-" else prompt or ""
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    if save_state is not None:
        if stream or max_new_tokens is not None or exit_depth is not None:
            raise RefoldError("save_state: nothing is generated with it; leave out what says how, and use --state next")
        require_free(save_state, overwrite)
    generator = TextGenerator(model, dtype=dtype, device=device)
    if adapters is not None:
        load_adapters(generator.model, adapters)
    begun = None if state is None else generator.load_state(state)
    if save_state is not None:
        with progress("reading", "tokens") as on_progress:
            read = generator.read_prompt(text, chat=chat, state=begun, on_progress=on_progress)
        read.save(save_state, overwrite)
        note(f"{len(read.token_ids):,} tokens read; {save_state} keeps {format_bytes(read.num_bytes)} of them")
    elif stream:
        for piece in generator.stream(text, sampling, chat=chat, exit_depth=exit_depth, state=begun):
            print(piece, end="", flush=True)
        print()
    else:
        print(generator.generate([text], sampling, chat=chat, exit_depth=exit_depth, state=begun)[0])
