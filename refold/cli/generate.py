"""`refold generate`: continuing a text."""

import sys
from pathlib import Path

from refold.cli import options
from refold.cli.show import format_bytes, note, progress
from refold.errors import RefoldError


def command(
    model: options.Model,
    prompt: options.PromptOption = None,
    chat: options.Chat = False,
    stream: options.Stream = False,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: options.Seed = 0,
    save_state: options.SaveState = None,
    state: options.StateOption = None,
    overwrite: options.Overwrite = False,
    adapters: options.Adapters = None,
    exit_depth: options.ExitDepth = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Continue a prompt with a folded model, or with a source."""
    from refold.generation.generate import TextGenerator
    from refold.generation.sampling import Sampling
    from refold.generation.state import require_free
    from refold.modeling.adapters import load_adapters

    _require_task(prompt, state, save_state, generates=stream or bool(exit_depth or max_new_tokens))
    text = sys.stdin.read() if prompt == "-" else prompt or ""
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, exit_depth)
    if save_state is not None:
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
        return
    how = {"chat": chat, "state": begun}
    for piece in generator.stream(text, sampling, **how) if stream else generator.generate([text], sampling, **how):
        print(piece, end="", flush=True)
    print()


def _require_task(prompt: str | None, state: Path | None, save_state: Path | None, generates: bool) -> None:
    """Checks that there is a prompt or a state, and that no generation option is combined with --save-state."""
    if prompt is None and state is None:
        raise RefoldError("prompt: a text to continue is required (got none); give --prompt, or --state to go on")
    if save_state is not None and generates:
        raise RefoldError(
            "save_state: nothing is generated with it; drop --stream, --max-new-tokens and --exit-depth, and use "
            "--state next"
        )
