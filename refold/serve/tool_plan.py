"""Which tools a request offers, how calls of them are read, and what form its answer is held to."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from refold.serve.bodies import ChatBody, GenerationBody
from refold.serve.faults import ApiFault
from refold.serve.forms import AnswerForm
from refold.serve.tool_bodies import ChosenFunction, JsonFormat, SchemaFormat
from refold.serve.tool_calls import ALWAYS, CallFormat, CallReader, find_format, takes_tools
from refold.suggest import did_you_mean, shorten


class ToolPlan(NamedTuple):
    """The use of tools by one request.

    Attributes:
        options: Variables of the chat template.
        kind: Format of the calls; None: none are read.
        most: Most calls; None: no limit.
        only: The function that is called in any case; the answer is its arguments.
        form: Form of an answer that must be calls.
    """

    options: Mapping[str, Any] = {}
    kind: CallFormat | None = None
    most: int | None = None
    only: str | None = None
    form: AnswerForm | None = None

    def reader(self) -> CallReader | None:
        """Returns a new reader of calls, for one choice; None: the text is the message."""
        return None if self.kind is None else CallReader(self.kind, self.most, self.only)


def plan_tools(body: ChatBody, template: str) -> ToolPlan:
    """Returns what a request does with tools.

    Raises:
        ApiFault: The request contradicts itself, or the model has no tools.
    """
    choice, tools = body.tool_choice, body.tools or []
    if not tools:
        if choice not in (None, "none", "auto"):
            raise _contradicts("tool_choice", f"`tools` are required for a choice among them (got {_told(choice)})")
        return ToolPlan()
    names = [each.function.name for each in tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _contradicts("tools", f"names must differ (got {shorten(twice)} twice)")
    if choice == "none":
        return ToolPlan()
    if not template or not takes_tools(template):
        raise _unsupported("tools", "the model's chat template takes none")
    kind, most = find_format(template), 1 if body.parallel_tool_calls is False else None
    options = {"tools": [each.model_dump(exclude_none=True) for each in tools]}
    schemas = {each.function.name: each.function.parameters or {"type": "object"} for each in tools}
    if isinstance(choice, ChosenFunction):
        name = choice.function.name
        if name not in schemas:
            raise _contradicts(
                "tool_choice", f"must name one of the tools (got {shorten(name)}){did_you_mean(name, names)}"
            )
        return ToolPlan(options, ALWAYS, 1, name, AnswerForm("tools", "schema", json.dumps(schemas[name])))
    if choice == "required":
        return ToolPlan(
            options, ALWAYS, most, None, AnswerForm("tools", "schema", json.dumps(_calls_schema(schemas, most)))
        )
    if kind is None:
        raise _unsupported("tools", "the form in which this chat template writes calls is not known here")
    strict = next((each.function.name for each in tools if each.function.strict), None)
    if strict is not None:
        raise _unsupported("tools", f"`strict` of {strict} needs a `tool_choice` that asks for a call")
    return ToolPlan(options, kind, most)


def read_form(body: GenerationBody, plan: ToolPlan) -> AnswerForm | None:
    """Returns the form that the answer of a request is held to.

    Raises:
        ApiFault: The request asks for two forms.
    """
    found: dict[str, AnswerForm] = {}
    if isinstance(body.response_format, JsonFormat):
        found["response_format"] = AnswerForm("response_format", "json")
    elif isinstance(body.response_format, SchemaFormat):
        found["response_format"] = AnswerForm(
            "response_format", "schema", json.dumps(body.response_format.json_schema.schema_)
        )
    asked = body.structured_outputs
    if asked is not None:
        forms = [
            *([] if asked.regex is None else [AnswerForm("structured_outputs", "regex", asked.regex)]),
            *([] if asked.choice is None else [AnswerForm("structured_outputs", "strings", json.dumps(asked.choice))]),
            *([] if asked.json_ is None else [AnswerForm("structured_outputs", "schema", json.dumps(asked.json_))]),
        ]
        if len(forms) != 1:
            raise _contradicts(
                "structured_outputs", f"exactly one of regex, choice and json is required (got {len(forms)})"
            )
        found["structured_outputs"] = forms[0]
    if len(found) > 1:
        raise _contradicts("structured_outputs", "no `response_format` is required beside it (got both)")
    if found and plan.kind is not None:
        raise _contradicts(next(iter(found)), "no `tools` that may be called are required beside it (got both)")
    return next(iter(found.values()), plan.form)


def _calls_schema(schemas: Mapping[str, Any], most: int | None) -> dict[str, Any]:
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": schema},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, schema in schemas.items()
    ]
    bounds = {"minItems": 1} if most is None else {"minItems": 1, "maxItems": most}
    return {"type": "array", "items": calls[0] if len(calls) == 1 else {"anyOf": calls}, **bounds}


def _told(choice: Any) -> str:
    return choice if isinstance(choice, str) else f"the function {shorten(choice.function.name)}"


def _contradicts(field: str, rest: str) -> ApiFault:
    return ApiFault(400, f"{field}: {rest}", param=field, code="contradiction")


def _unsupported(field: str, reason: str) -> ApiFault:
    return ApiFault(400, f"{field}: not supported, because {reason}", param=field, code="unsupported_parameter")
