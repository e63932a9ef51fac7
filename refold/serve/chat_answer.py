"""Choices of `/v1/chat/completions`."""

from typing import Any

from refold.serve.answer_shapes import refold_tokens
from refold.serve.asking import ChoicePart
from refold.serve.bodies import ChatBody
from refold.serve.prompting import Prompter
from refold.serve.tool_calls import AnswerPieces, CallPiece, CallReader
from refold.serve.tool_plan import ToolPlan

CHAT, CHAT_CHUNK = "chat.completion", "chat.completion.chunk"


class ChatWriter:
    """Writes the choices of one request, in pieces or whole.

    Args:
        body: The request.
        prompter: Of the model.
        plan: What the request does with tools.
    """

    def __init__(self, body: ChatBody, prompter: Prompter, plan: ToolPlan):
        self._body, self._prompter, self._plan = body, prompter, plan
        self._readers: dict[int, CallReader | None] = {}
        self._marker = prompter.special_token(plan.kind.begin) if plan.kind is not None else None

    def delta(self, index: int, part: ChoicePart) -> dict[str, Any]:
        """Returns the next piece of a choice."""
        delta: dict[str, Any] = {"role": "assistant"} if index not in self._readers else {}
        pieces, reason = self._read(index, part)
        if pieces.content or not pieces.calls:
            delta["content"] = pieces.content
        if pieces.calls:
            delta["tool_calls"] = [_call_delta(each) for each in pieces.calls]
        return self._around(index, part, reason, {"delta": delta})

    def choice(self, index: int, part: ChoicePart) -> dict[str, Any]:
        """Returns a whole choice."""
        pieces, reason = self._read(index, part)
        message: dict[str, Any] = {"role": "assistant", "content": pieces.content, "refusal": None}
        if pieces.calls:
            message["content"] = pieces.content or None
            message["tool_calls"] = [
                {"id": each.id, "type": "function", "function": {"name": each.name, "arguments": each.arguments}}
                for each in pieces.calls
            ]
        return self._around(index, part, reason, {"message": message})

    def _read(self, index: int, part: ChoicePart) -> tuple[AnswerPieces, str | None]:
        """Returns what a part gives, and why the choice has ended."""
        reader = self._readers.setdefault(index, self._plan.reader())
        if reader is None:
            return AnswerPieces(part.text), part.reason
        pieces = reader.add(self._text_with_markers(part))
        if part.reason is not None:
            pieces.join(reader.finish())
        return pieces, "tool_calls" if reader.num_calls and part.reason == "stop" else part.reason

    def _text_with_markers(self, part: ChoicePart) -> str:
        """Returns the text of a part with the special tokens that mark calls, which have no text of their own."""
        if self._marker is None or self._plan.kind is None:
            return part.text
        return "".join(
            self._plan.kind.begin if token is not None and token.token == self._marker and not text else text
            for token, text in part.tokens
        )

    def _around(self, index: int, part: ChoicePart, reason: str | None, message: dict[str, Any]) -> dict[str, Any]:
        written: dict[str, Any] = {
            "index": index,
            **message,
            "logprobs": self._logprobs(part) if self._body.logprobs else None,
            "finish_reason": reason,
        }
        if self._body.return_tokens:
            written["refold_tokens"] = refold_tokens(part, self._prompter, bool(self._body.logprobs))
        return written

    def _logprobs(self, part: ChoicePart) -> dict[str, Any]:
        content = [
            {
                **self._named(token.token, token.logprob),
                "top_logprobs": [self._named(each.token, each.logprob) for each in token.alternatives or ()],
            }
            for token, _ in part.tokens
            if token is not None
        ]
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, raw = self._prompter.piece(token)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}


def _call_delta(piece: CallPiece) -> dict[str, Any]:
    if piece.id is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}
