"""Settings of the engine as a request asks for them."""

from typing import Any

from refold.errors import RefoldError
from refold.generation.sampling import Sampling
from refold.serve.bodies import ChatBody, CompletionBody, GenerationBody
from refold.serve.faults import ApiFault, field_fault
from refold.serve.forms import AnswerForm
from refold.serve.messages import EngineFacts
from refold.suggest import MAX_NUMBER

COMPLETION_TOKENS = 16
"""New tokens of a completion that asks for no number, as in OpenAI's API."""


def read_sampling(body: GenerationBody, facts: EngineFacts, form: AnswerForm | None = None) -> Sampling:
    """Returns the settings of a request, apart from its seed and its number of new tokens.

    Args:
        body: The request.
        facts: Of the engine.
        form: Form that the answer is held to.

    Raises:
        ApiFault: Settings do not fit each other or the model.
    """
    settings: dict[str, Any] = {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_k": max(body.top_k or 0, 0),
        "min_p": body.min_p or 0.0,
        "n": body.n or 1,
        "stop": body.stop,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "repetition_penalty": body.repetition_penalty or 1.0,
        "logit_bias": body.logit_bias,
        "ignore_eos": bool(body.ignore_eos),
        "exit_depth": body.exit_depth,
        "exit_tolerance": body.exit_tolerance,
        "logprobs": _num_logprobs(body),
    }
    _check_exits(body, facts)
    names = {"max_new_tokens": "max_tokens"}
    if form is not None:
        if body.ignore_eos:
            raise _bad("ignore_eos", f"must be false beside `{form.field}`, which the end token ends", "contradiction")
        settings["constraint"] = {"kind": form.kind, "text": form.text}
        names |= {f"constraint{part}": form.field for part in ("", ".kind", ".text")}
    if isinstance(body, CompletionBody) and (body.max_tokens == 0 or (body.echo and body.logprobs is not None)):
        settings["prompt_logprobs"] = _num_prompt_logprobs(body)
    for token in body.logit_bias:
        if token >= facts.vocab_size:
            raise _bad("logit_bias", f"tokens must lie in 0..{facts.vocab_size - 1} (got {token})")
    try:
        return Sampling(**settings)
    except RefoldError as error:
        raise field_fault(error, names) from None


def read_seed(body: GenerationBody) -> int | None:
    """Returns the seed of a request; None: each prompt gets a new one."""
    return None if body.seed is None else body.seed & MAX_NUMBER


def read_max_new_tokens(body: GenerationBody, prompts: list[list[int]], facts: EngineFacts) -> int:
    """Returns the number of new tokens for each prompt.

    Raises:
        ApiFault: A prompt, or a prompt with its new tokens, does not fit; both lengths are told.
    """
    name, wanted = "max_tokens", body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        name, wanted = "max_completion_tokens", body.max_completion_tokens
    if isinstance(body, CompletionBody) and wanted is None:
        wanted = COMPLETION_TOKENS
    room = min(facts.max_context, facts.max_tokens)
    longest = max(map(len, prompts))
    param = "messages" if isinstance(body, ChatBody) else "prompt"
    most = room - (wanted != 0)
    if longest > most:
        reason = ", so that one more fits" if wanted != 0 else ","
        raise ApiFault(
            400,
            f"{param}: must be at most {most} tokens{reason} the model's {room} (got {longest})",
            param=param,
            code="context_length_exceeded",
        )
    if wanted is None or (name == "max_tokens" and body.max_tokens is None):
        return min(wanted or room, room - longest)
    if longest + wanted > room:
        raise ApiFault(
            400,
            f"{name}: must be at most {room - longest} after a prompt of {longest} tokens, so that all fit the model's "
            f"{room} (got {wanted})",
            param=name,
            code="context_length_exceeded",
        )
    return wanted


def require_known(prompts: list[list[int]], facts: EngineFacts, param: str = "prompt") -> None:
    """Checks that the tokens of prompts are in the vocabulary.

    Raises:
        ApiFault: One is not.
    """
    for prompt in prompts:
        if max(prompt, default=0) >= facts.vocab_size:
            raise _bad(param, f"tokens must lie in 0..{facts.vocab_size - 1} (got {max(prompt)})")


def _check_exits(body: GenerationBody, facts: EngineFacts) -> None:
    depth, tolerance = body.exit_depth, body.exit_tolerance
    if depth is not None and depth > facts.num_depths:
        raise _bad("exit_depth", f"must lie in 1..{facts.num_depths} (got {depth})")
    if depth is not None and tolerance is not None:
        raise _bad("exit_tolerance", f"`exit_depth` must be absent beside it (got {depth})", "contradiction")
    if tolerance and not facts.tolerances:
        reason = f"must be 0, because the model is served without calibrated exits (got {tolerance:g})"
        raise _bad("exit_tolerance", reason, "unsupported_parameter")


def _num_logprobs(body: GenerationBody) -> int | None:
    if isinstance(body, CompletionBody):
        return body.logprobs
    assert isinstance(body, ChatBody)
    if body.top_logprobs and not body.logprobs:
        raise _bad("top_logprobs", f"`logprobs` must be true (got {body.top_logprobs} without it)", "contradiction")
    return body.top_logprobs or 0 if body.logprobs else None


def _num_prompt_logprobs(body: CompletionBody) -> int:
    """Returns the number of likeliest tokens to tell for each token of the prompt."""
    if not body.echo:
        raise _bad("max_tokens", "must be at least 1 without `echo` (got 0)", "contradiction")
    if body.stream and body.logprobs is not None:
        raise _bad("echo", "`stream` must be false with `logprobs`, which come when all are known", "contradiction")
    return body.logprobs or 0


def _bad(field: str, rest: str, code: str = "out_of_range") -> ApiFault:
    return ApiFault(400, f"{field}: {rest}", param=field, code=code)
