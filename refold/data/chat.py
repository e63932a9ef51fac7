"""Conversations, and their encoding by a chat template with a mask of the tokens to train on."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from refold.data.chat_template import TemplateFault, apply_chat_template
from refold.data.encoder import EncodedDocument, Encoder
from refold.errors import DataError
from refold.suggest import did_you_mean

ASSISTANT = "assistant"
ROLES = (ASSISTANT, "user", "system", "developer", "tool")


@dataclass(frozen=True)
class Conversation:
    """A list of chat messages.

    Attributes:
        messages: At least one. Each has a `role` of `ROLES`, `content`, and other keys for the chat template
            (`tool_calls`, `name`, ...). Keys without a value are dropped.
        where: File and place, for error messages.
    """

    messages: tuple[dict[str, Any], ...]
    where: str = field(compare=False)


def read_conversation(value: object, where: str) -> Conversation:
    """Checks a `messages` list of a file and returns it as a conversation.

    Args:
        value: A list of `{role, content}`. `content` may be missing in a message with `tool_calls`.
        where: File and place, for error messages.

    Raises:
        DataError: The value is not such a list, a role is unknown, or no message is of the assistant.
    """
    if not isinstance(value, list | tuple) or not value:
        got = "an empty list" if isinstance(value, list | tuple) else _kind(value)
        raise DataError(f"{where}: a list of messages with role and content is required (got {got})")
    messages = tuple(_message(message, f"{where}, message {index}") for index, message in enumerate(value))
    if all(message["role"] != ASSISTANT for message in messages):
        roles = [message["role"] for message in messages]
        raise DataError(f"{where}: a message of the assistant is required (got roles {roles}); drop such rows")
    return Conversation(messages, where)


def _message(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: an object with role and content is required (got {_kind(value)})")
    # In parquet every row has the keys of all rows, with None for the missing ones.
    message = {str(key): part for key, part in value.items() if part is not None}
    role = message.get("role")
    if role not in ROLES:
        hint = did_you_mean(str(role), ROLES)
        raise DataError(f"{where}: a role of {', '.join(ROLES)} is required (got {role!r}){hint}")
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise DataError(f"{where}: content must be a string (got {_kind(content)})")
    if content is not None and not _is_unicode(content):
        raise DataError(f"{where}: content must be Unicode text (got a lone surrogate)")
    return message


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MEND = "mark the assistant's part with {% generation %} in the chat template"


class _Rendered(NamedTuple):
    """The text of a conversation; `spans` are the character ranges of the assistant's turns."""

    text: str
    spans: list[tuple[int, int]]


class ChatEncoder(Encoder):
    """Encodes conversations; the targets are the tokens of the assistant alone.

    A template with `{% generation %}` blocks marks these tokens itself. For any other template a turn of the assistant
    is the text after the generation prompt. Then the text up to a turn must be a prefix of the text with the turn, and
    of the whole conversation; this is checked. A token belongs to the assistant if its first character does. No start
    token is added to the text of the template.
    """

    has_targets = True
    # Threads do not speed up templates, which run as Python code, and must not share the settings of a tokenizer.
    max_threads = 1

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        if not tokenizer.chat_template:
            raise DataError("chat: a tokenizer with a chat template is required (got none); add one, or train on text")
        if not tokenizer.is_fast:
            raise DataError(f"chat: a fast tokenizer is required (got {type(tokenizer).__name__})")
        try:
            self._template = tokenizer.get_chat_template()
        except ValueError as error:
            reason = str(error).splitlines()[0][:120]
            raise DataError(f"chat: one default chat template is required ({reason})") from error
        self._is_marked = _GENERATION.search(self._template) is not None

    def key(self) -> list[Any]:
        return [*super().key(), self._template, sorted(self.tokenizer.special_tokens_map.items())]

    def num_characters(self, document: Any) -> int:
        if not isinstance(document, Conversation):
            raise DataError(f"data: conversations are required for chat (got a {type(document).__name__})")
        return sum(len(message.get("content") or "") for message in document.messages)

    def encode(self, documents: Sequence[Any], room: int | None) -> list[EncodedDocument]:
        if self._is_marked:
            return [self._encode_marked(conversation) for conversation in documents]
        rendered = [self._render_turns(conversation) for conversation in documents]
        encodings = self._backend.encode_batch([each.text for each in rendered], add_special_tokens=False)
        found = []
        for conversation, (text, spans), encoding in zip(documents, rendered, encodings, strict=True):
            starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
            is_target = np.zeros(len(starts), dtype=bool)
            for start, stop in spans:
                is_target |= (starts >= start) & (starts < stop)
            found.append(self._document(conversation, encoding.ids, is_target, text))
        return found

    def _encode_marked(self, conversation: Conversation) -> EncodedDocument:
        try:
            found: Any = apply_chat_template(
                self.tokenizer,
                list(conversation.messages),
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
        except TemplateFault as error:
            raise _refused(conversation, error) from error
        text = str(self.tokenizer.decode(found["input_ids"], clean_up_tokenization_spaces=False))
        return self._document(conversation, found["input_ids"], np.array(found["assistant_masks"], dtype=bool), text)

    def _render_turns(self, conversation: Conversation) -> _Rendered:
        messages = conversation.messages
        spans: list[tuple[int, int]] = []
        texts: list[str] = []
        for index, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                prompt = self._render(conversation, index, add_generation_prompt=True)
                turn = self._render(conversation, index + 1)
                spans.append((len(prompt), len(turn)))
                texts += [prompt, turn]
        if messages[-1]["role"] != ASSISTANT:
            texts.append(self._render(conversation, len(messages)))
        for before, after in itertools.pairwise(texts):
            # The finished turn may differ from the end of the prompt, and a later turn may change an earlier one.
            if not after.startswith(before):
                same = next(place for place, (a, b) in enumerate(zip(before, after + "\0", strict=False)) if a != b)
                raise DataError(
                    f"{conversation.where}: a chat template that only adds text per turn is required (it writes "
                    f"{before[same : same + 20]!r} and, one step later, {after[same : same + 20]!r}); {_MEND}"
                )
        return _Rendered(texts[-1], spans)

    def _render(self, conversation: Conversation, num_messages: int, add_generation_prompt: bool = False) -> str:
        try:
            # A batch of one, because transformers refuses an empty conversation that is not in a batch, and some
            # conversations begin with the assistant.
            texts: Any = apply_chat_template(
                self.tokenizer,
                [list(conversation.messages[:num_messages])],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateFault as error:
            raise _refused(conversation, error) from error
        return texts[0]

    def _document(
        self, conversation: Conversation, ids: list[int], is_target: np.ndarray, text: str
    ) -> EncodedDocument:
        if not is_target.any():
            raise DataError(
                f"{conversation.where}: at least one token of the assistant is required (got none from the template); "
                f"drop such rows, or {_MEND}"
            )
        return EncodedDocument(np.array(ids, dtype=self.dtype), is_target, len(text.encode("utf-8", "replace")))


def _refused(conversation: Conversation, error: TemplateFault) -> DataError:
    return DataError(f"{conversation.where}: messages that the chat template takes are required ({error})")
