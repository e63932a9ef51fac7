from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from refold.data.chat import ChatEncoder, Conversation
from refold.data.encoder import EncodedDocument
from refold.errors import DataError

PLAIN = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ message.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [
    ("system", "be kind"),
    ("user", "hello dog é"),
    ("assistant", "hello, 漢!"),
    ("user", "x"),
    ("assistant", "two"),
]


def _talk(turns: list[tuple[str, str]]) -> Conversation:
    return Conversation(tuple({"role": role, "content": content} for role, content in turns), "a.jsonl:3")


def _encode(tokenizer: Any, turns: list[tuple[str, str]]) -> EncodedDocument:
    return ChatEncoder(tokenizer).encode([_talk(turns)], None)[0]


def _said(tokenizer: Any, found: EncodedDocument) -> list[str]:
    """The texts of the runs of tokens to be predicted."""
    assert found.is_target is not None
    runs: list[list[int]] = []
    for index, token in enumerate(found.ids.tolist()):
        if found.is_target[index]:
            if index == 0 or not found.is_target[index - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "marked"])
def test_only_what_the_assistant_says_is_to_be_predicted(make_tokenizer: Callable[..., Any], template: str):
    tokenizer = make_tokenizer(chat_template=template)
    found = _encode(tokenizer, TURNS)
    assert found.ids.tolist() == tokenizer.apply_chat_template(_talk(TURNS).messages)["input_ids"]
    assert _said(tokenizer, found) == ["hello, 漢!<|im_end|>\n", "two<|im_end|>\n"]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "marked"])
@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([("assistant", "one"), ("user", "two")], ["one<|im_end|>\n"]),
        ([("user", "a"), ("assistant", "b"), ("assistant", "c")], ["b<|im_end|>\n", "c<|im_end|>\n"]),
        ([("user", "a"), ("assistant", "b"), ("tool", "c"), ("user", "d")], ["b<|im_end|>\n"]),
    ],
)
def test_turns_may_come_in_any_order_the_template_takes(make_tokenizer: Any, template: str, turns: Any, said: Any):
    tokenizer = make_tokenizer(chat_template=template)
    assert _said(tokenizer, _encode(tokenizer, turns)) == said


def test_another_template_is_another_key(make_tokenizer: Callable[..., Any]):
    keys = [ChatEncoder(make_tokenizer(chat_template=template)).key() for template in (PLAIN, PLAIN, MARKED)]
    assert keys[0] == keys[1] != keys[2]


def test_a_template_is_required(tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(DataError, match=r"chat: a tokenizer with a chat template is required \(got none\)"):
        ChatEncoder(tokenizer)


def test_one_default_template_is_required(tokenizer: PreTrainedTokenizerFast):
    tokenizer.chat_template = {"one": PLAIN, "two": PLAIN}  # pyright: ignore
    with pytest.raises(DataError, match=r"chat: one default chat template is required"):
        ChatEncoder(tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused(make_tokenizer: Callable[..., Any]):
    template = (
        "{% for message in messages %}[{{ message.role }}]{% if message.role == 'user' or loop.last %}"
        "{{ message.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    assert _said(tokenizer, _encode(tokenizer, TURNS[1:3])) == ["hello, 漢!"]
    with pytest.raises(
        DataError, match=r"a\.jsonl:3: a chat template that only adds text .*'hello, 漢!'.*generation %"
    ):
        _encode(tokenizer, TURNS)


@pytest.mark.parametrize("marks", ["", "{% generation %}{% endgeneration %}"])
def test_messages_the_template_refuses_are_named(make_tokenizer: Callable[..., Any], marks: str):
    template = marks + "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"a\.jsonl:3: messages that .* takes are required \(roles must alternate\)"):
        _encode(make_tokenizer(chat_template=template), TURNS)


def test_a_template_that_leaves_the_assistant_out_is_refused(make_tokenizer: Callable[..., Any]):
    template = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"a\.jsonl:3: at least one token of the assistant is required"):
        _encode(make_tokenizer(chat_template=template), TURNS)


def test_texts_are_no_conversations(make_tokenizer: Callable[..., Any]):
    encoder: Any = ChatEncoder(make_tokenizer(chat_template=PLAIN))
    with pytest.raises(DataError, match=r"conversations are required for chat \(got a str\)"):
        encoder.num_characters("hello")
