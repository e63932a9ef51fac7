"""Fields of OpenAI's two endpoints that this server does not act on, and why."""

from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, NamedTuple

from refold.serve.faults import ApiFault
from refold.suggest import shorten

Endpoint = Literal["completions", "chat"]


class UnusedField(NamedTuple):
    """A field that is taken only with values that ask for nothing.

    Attributes:
        harmless: Values that change nothing, so that they are taken.
        reason: Why others are refused.
    """

    harmless: tuple[Any, ...]
    reason: str


IGNORED: Mapping[str, str] = {
    "user": "names a person to the service; no answer depends on it",
    "metadata": "labels of stored answers; nothing is stored",
    "safety_identifier": "names a person to the service; no answer depends on it",
    "prompt_cache_key": "equal beginnings of prompts share their work here without a key",
    "prompt_cache_retention": "equal beginnings stay as long as there is room",
}
"""Fields that are taken with any value, because none changes the answer."""
_BOTH: Mapping[str, UnusedField] = {
    "service_tier": UnusedField(("auto", "default"), "there is one tier"),
}
REFUSED: Mapping[Endpoint, Mapping[str, UnusedField]] = {
    "completions": {
        **_BOTH,
        "best_of": UnusedField((1,), "choices are not ranked; ask for `n` with `logprobs` and rank them"),
        "suffix": UnusedField(("",), "the model goes on with a prompt; it does not fill a gap"),
    },
    "chat": {
        **_BOTH,
        "audio": UnusedField((), "the model writes text alone"),
        "modalities": UnusedField((["text"],), "the model writes text alone"),
        "prediction": UnusedField((), "predicted text is not used"),
        "store": UnusedField((False,), "answers are not stored"),
        "reasoning_effort": UnusedField(("none",), "the model has no levels of effort; see `exit_tolerance`"),
        "verbosity": UnusedField(("medium",), "the model has no levels of length; see `max_completion_tokens`"),
        "web_search_options": UnusedField((), "nothing is searched"),
        "moderation": UnusedField((), "nothing is moderated"),
        "functions": UnusedField(([],), "give `tools`"),
        "function_call": UnusedField(("none",), "give `tool_choice`"),
    },
}
"""Fields that are refused, because they would change the answer; null is always harmless."""


def drop_unused(endpoint: Endpoint, fields: MutableMapping[str, Any]) -> None:
    """Removes the fields that are not acted on.

    Raises:
        ApiFault: One of them asks for something.
    """
    for name in IGNORED:
        fields.pop(name, None)
    for name, unused in REFUSED[endpoint].items():
        value = fields.pop(name, None)
        if value is not None and not any(value == each and type(value) is type(each) for each in unused.harmless):
            raise ApiFault(
                400,
                f"{name}: not supported, because {unused.reason} (got {shorten(value)})"
                if not unused.reason.startswith("give ")
                else f"{name}: not supported; {unused.reason} instead (got {shorten(value)})",
                param=name,
                code="unsupported_parameter",
            )
