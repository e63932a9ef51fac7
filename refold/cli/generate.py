"""`refold generate`: continuing a text, or a file of prompts."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refold.cli import options
from refold.cli.show import format_bytes, note, print_json, progress
from refold.errors import RefoldError

if TYPE_CHECKING:
    from refold.engine.engine import Engine
    from refold.generation.sampling import Sampling


def command(
    model: options.Model,
    prompt: options.PromptOption = None,
    chat: options.Chat = False,
    stream: options.Stream = False,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    logit_bias: options.LogitBias = None,
    logprobs: options.LogprobsOption = None,
    n: options.NumChoices = 1,
    ignore_eos: options.IgnoreEos = False,
    prompts: options.PromptsOption = None,
    out: options.AnswersOption = None,
    json: options.Json = False,
    reference: options.ReferenceOption = False,
    save_state: options.SaveState = None,
    state: options.StateOption = None,
    overwrite: options.Overwrite = False,
    adapters: options.Adapters = None,
    exit_depth: options.ExitDepth = None,
    weights: options.EngineWeights = "auto",
    exits: options.TakeExits = False,
    drafts: options.DraftSource = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Continue a prompt with a folded model, or with a source; or all prompts of a file."""
    from refold.generation.sampling import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        exit_depth=exit_depth,
        min_p=min_p,
        stop=stop or (),
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=dict(logit_bias or ()),
        logprobs=logprobs,
        n=n,
        ignore_eos=ignore_eos,
    )
    generates = stream or bool(exit_depth or max_new_tokens)
    _require_task(prompt, state, save_state, prompts, generates=generates)
    _require_fitting(sampling, prompts, out, {"--stream": stream, "--json": json, "--reference": reference or state})
    if weights != "auto" and dtype is not None:
        raise RefoldError(f"weights: no --dtype is required beside it (got --weights {weights} --dtype {dtype})")
    ours = {"weights": weights, "exits": exits, "drafts": drafts}
    if reference and ours != {"weights": "auto", "exits": False, "drafts": None}:
        raise RefoldError("reference: no --weights, --exits and --drafts are required; transformers has none of them")
    where = {"dtype": dtype, "device": device}
    if prompts is not None and out is not None:
        _answer_file(model, adapters, (prompts, out), sampling, {"chat": chat, "overwrite": overwrite, **where, **ours})
        return
    text = sys.stdin.read() if prompt == "-" else prompt or ""
    if reference or state is not None or save_state is not None:
        how = {"chat": chat, "stream": stream, "state": state, "save_state": save_state, "overwrite": overwrite}
        _continue_with_transformers(model, adapters, text, sampling, {**how, **where})
        return
    _continue(_open_engine(model, adapters, **where, **ours), text, sampling, chat=chat, stream=stream, json=json)


def _open_engine(
    model: str,
    adapters: str | None,
    dtype: str | None,
    device: str | None,
    weights: str,
    exits: bool,
    drafts: str | None,
) -> "Engine":
    from refold.engine.engine import Engine
    from refold.engine.opening import open_model
    from refold.engine.settings import Drafts, EngineSettings
    from refold.modeling.adapters import load_adapters
    from refold.modeling.load import load_tokenizer

    form = weights if dtype is None or dtype == "float16" else dtype
    settings = EngineSettings(
        weights=form,
        exits="calibrated" if exits else None,
        drafts=None if drafts is None else Drafts(drafts),
    )
    if adapters is None and dtype != "float16":
        return Engine(model, settings, device=device)
    tokenizer, opened = load_tokenizer(model), open_model(model, dtype, device)
    if adapters is not None:
        load_adapters(opened, adapters)
    return Engine(opened, settings, tokenizer=tokenizer)


def _continue(engine: "Engine", text: str, sampling: "Sampling", *, chat: bool, stream: bool, json: bool) -> None:
    """Prints the continuations of one prompt."""
    from refold.engine.answers import require_success, stream_text

    if stream:
        for piece in stream_text(engine, text, sampling, chat=chat):
            print(piece, end="", flush=True)
        print()
        return
    result = require_success(engine.generate([text], sampling, chat=chat)[0])
    if json:
        print_json(asdict(result))
    else:
        for number, choice in enumerate(result.choices, start=1):
            print(choice.text if len(result.choices) == 1 else f"[{number}] {choice.text}")


def _answer_file(
    model: str, adapters: str | None, files: tuple[Path, Path], sampling: "Sampling", given: dict[str, Any]
) -> None:
    """Answers a file of prompts; arguments that change the results must be those of the run that is continued."""
    from refold.checkpoint.locate import locate
    from refold.engine.answers import answer_file
    from refold.engine.prompt_file import read_prompts
    from refold.engine.result_file import ResultFile

    overwrite, chat = given.pop("overwrite"), given.pop("chat")
    prompts, source = read_prompts(files[0], sampling), locate(model)
    run = {
        "prompts_sha256": prompts.sha256,
        "model": {"name": source.where, **source.fingerprint()},
        "adapters": adapters,
        "engine": {name: given[name] for name in ("dtype", "weights", "exits", "drafts")},
        "chat": chat,
        "sampling": asdict(sampling),
    }
    with ResultFile(files[1], run, len(prompts.lines), overwrite) as results:
        if len(results.finished) < len(prompts.lines):
            engine = _open_engine(model, adapters, **given)
            note(engine.describe())
            with progress("generating", "prompts") as on_progress:
                report = answer_file(engine, prompts, results, chat=chat, on_progress=on_progress)
            failed = f", {report.failed:,} of them with a fault" if report.failed else ""
            note(f"{files[1]}: {report.answered:,} results added{failed}; {report.prompts:,} in all")
        else:
            note(f"{files[1]}: all {len(prompts.lines):,} results are there already; --overwrite makes them anew")


def _continue_with_transformers(
    model: str, adapters: str | None, text: str, sampling: "Sampling", given: dict[str, Any]
) -> None:
    """Reads or continues a state, or generates for comparison."""
    from refold.generation.generate import TextGenerator
    from refold.generation.state import require_free
    from refold.modeling.adapters import load_adapters

    save_state, chat = given["save_state"], given["chat"]
    if save_state is not None:
        require_free(save_state, given["overwrite"])
    generator = TextGenerator(model, dtype=given["dtype"], device=given["device"])
    if adapters is not None:
        load_adapters(generator.model, adapters)
    begun = None if given["state"] is None else generator.load_state(given["state"])
    if save_state is not None:
        with progress("reading", "tokens") as on_progress:
            read = generator.read_prompt(text, chat=chat, state=begun, on_progress=on_progress)
        read.save(save_state, given["overwrite"])
        note(f"{len(read.token_ids):,} tokens read; {save_state} keeps {format_bytes(read.num_bytes)} of them")
        return
    how, is_streamed = {"chat": chat, "state": begun}, given["stream"]
    for piece in (
        generator.stream(text, sampling, **how) if is_streamed else generator.generate([text], sampling, **how)
    ):
        print(piece, end="", flush=True)
    print()


def _require_task(
    prompt: str | None, state: Path | None, save_state: Path | None, prompts: Path | None, generates: bool
) -> None:
    """Checks that there is one thing to continue, and that no generation option is combined with --save-state."""
    if prompts is not None:
        for name, value in (("prompt", prompt), ("state", state), ("save_state", save_state)):
            if value is not None:
                raise RefoldError(f"{name}: no other prompt is allowed with --prompts (got {value}); drop one of them")
    elif prompt is None and state is None:
        raise RefoldError(
            "prompt: a text to continue is required (got none); give --prompt, --prompts for a file of them, or "
            "--state to go on"
        )
    if save_state is not None and generates:
        raise RefoldError(
            "save_state: nothing is generated with it; drop --stream, --max-new-tokens and --exit-depth, and use "
            "--state next"
        )


def _require_fitting(sampling: "Sampling", prompts: Path | None, out: Path | None, ways: dict[str, Any]) -> None:
    """Checks options that need or exclude each other."""
    if (prompts is None) != (out is None):
        missing = "--prompts" if prompts is None else "--out"
        raise RefoldError(f"{missing[2:]}: --prompts and --out are required together (got one); give {missing}")
    used = [name for name, value in ways.items() if value]
    if prompts is not None and used:
        raise RefoldError(f"prompts: must be used without {used[0]}; results are written to --out as JSON lines")
    if ways["--json"] and len(used) > 1:
        raise RefoldError(f"json: must be used without --stream, --reference and --state (got {' and '.join(used)})")
    if ways["--stream"] and sampling.n > 1:
        raise RefoldError(f"n: must be 1 with --stream (got {sampling.n}); drop --stream")
    if sampling.logprobs is not None and prompts is None and not ways["--json"] and not ways["--reference"]:
        raise RefoldError("logprobs: --json or --out is required to show them; add --json")
