"""Conversations, and their encoding through a chat template with a mask of trained tokens."""

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
    """Messages in order.

    Attributes:
        messages: at least one; `role` of `ROLES`, `content`, and whatever else the chat template reads (`tool_calls`,
            `name`, ...). Keys without a value are left out.
        where: file and place, for messages.
    """

    messages: tuple[dict[str, Any], ...]
    where: str = field(compare=False)


def read_conversation(value: object, where: str) -> Conversation:
    """Checks a `messages` list as it stands in a file.

    Args:
        value: a list of `{role, content}`. `content` may be missing where there are `tool_calls`.
        where: file and place, for messages.

    Raises:
        DataError: it is not such a list, a role is unknown, or the assistant says nothing in it.
    """
    if not isinstance(value, list | tuple) or not value:
        got = "an empty list" if isinstance(value, list | tuple) else _kind(value)
        raise DataError(f"{where}: a list of messages with role and content is required (got {got})")
    messages = tuple(_message(message, f"{where}, message {index}") for index, message in enumerate(value))
    if all(message["role"] != ASSISTANT for message in messages):
        roles = [message["role"] for message in messages]
        raise DataError(f"{where}: a message of the assistant is required (got roles {roles}); leave such rows out")
    return Conversation(messages, where)


def _message(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: an object with role and content is required (got {_kind(value)})")
    # Parquet gives every row the keys of all rows.
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
    """A conversation's text; `spans` are the character ranges the assistant says."""

    text: str
    spans: list[tuple[int, int]]


class ChatEncoder(Encoder):
    """Encodes conversations; only what the assistant says is to be predicted.

    What that is, the template says where it has `{% generation %}` blocks. Of any other template it is, for every turn
    of the assistant, what the template writes after the generation prompt, and this is checked: the text up to a turn
    must be the beginning of the text with the turn, and that of the whole. A token belongs to the assistant where its
    first character does. There is no start token beside what the template writes.
    """

    has_targets = True
    # Templates are Python code, which threads do not speed up, and the tokenizer's settings are not safe between them.
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
            # A prompt may end in what the finished turn writes otherwise; a later turn may rewrite an earlier one.
            if not after.startswith(before):
                same = next(place for place, (a, b) in enumerate(zip(before, after + "\0", strict=False)) if a != b)
                raise DataError(
                    f"{conversation.where}: a chat template that only adds text per turn is required (it writes "
                    f"{before[same : same + 20]!r} and, one step later, {after[same : same + 20]!r}); {_MEND}"
                )
        return _Rendered(texts[-1], spans)

    def _render(self, conversation: Conversation, num_messages: int, add_generation_prompt: bool = False) -> str:
        try:
            # In a list of its own, or no messages at all would be refused: some templates begin with the assistant.
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
                f"{conversation.where}: a word of the assistant is required (the chat template leaves none to learn); "
                f"leave such rows out, or {_MEND}"
            )
        return EncodedDocument(np.array(ids, dtype=self.dtype), is_target, len(text.encode("utf-8", "replace")))


def _refused(conversation: Conversation, error: TemplateFault) -> DataError:
    return DataError(f"{conversation.where}: messages that the chat template takes are required ({error})")
