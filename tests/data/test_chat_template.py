import time
from collections.abc import Callable
from typing import Any

import pytest

from refold.data import chat_template
from refold.data.chat import ChatEncoder, Conversation
from refold.data.chat_template import TemplateFault, apply_chat_template
from refold.errors import DataError, RefoldError
from refold.generation.prompts import encode_prompt

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "two"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROWING = (
    "{% set n = namespace(x='a' * 1000000) %}{% for a in range(99999) %}{% set n.x = n.x ~ 'b' * 1000000 %}"
    "{% endfor %}{{ n.x }}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1/0 }}", "division by zero"),
        ("{{ raise_exception('no system') }}", "no system"),
        ("{{ messages[9].content }}", "undefined|has no element"),
        ("{{ messages | first + 1 }}", "unsupported operand"),
        ("{% for", "unexpected|expected"),
    ],
)
def test_whatever_a_template_raises_is_one_line(make_tokenizer: Callable[..., Any], template: str, reason: str):
    tokenizer = make_tokenizer(chat_template=template)
    with pytest.raises(TemplateFault, match=reason) as caught:
        apply_chat_template(tokenizer, MESSAGES, tokenize=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(RefoldError, match="messages that the chat template takes are required"):
        encode_prompt(tokenizer, MESSAGES, chat=True)
    with pytest.raises(DataError, match="messages that the chat template takes are required"):
        ChatEncoder(tokenizer).encode([Conversation(tuple(MESSAGES), "a.jsonl:3")], None)


def test_an_endless_template_is_stopped(make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.3)
    begun = time.monotonic()
    with pytest.raises(TemplateFault, match=r"the template takes more than 0\.3 seconds"):
        apply_chat_template(make_tokenizer(chat_template=ENDLESS), MESSAGES, tokenize=False)
    assert time.monotonic() - begun < 30


def test_a_template_that_fills_the_memory_is_stopped(
    make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    if not chat_template._resident_bytes():
        pytest.skip("a system that tells a process's memory is required")
    monkeypatch.setattr(chat_template, "MAX_GROWTH", 2**25)
    with pytest.raises(TemplateFault, match="bytes"):
        apply_chat_template(make_tokenizer(chat_template=GROWING), MESSAGES, tokenize=False)


def test_too_long_a_text_is_refused(make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 10)
    with pytest.raises(TemplateFault, match="the template writes 25 characters, more than 10"):
        apply_chat_template(make_tokenizer(chat_template="{{ 'x' * 25 }}"), MESSAGES, tokenize=False)


def test_a_template_within_bounds_is_transformers_own(make_tokenizer: Callable[..., Any]):
    tokenizer = make_tokenizer(chat_template="{% for each in messages %}{{ each.content }}{% endfor %}")
    assert apply_chat_template(tokenizer, MESSAGES, tokenize=False) == "hellotwo"
    assert apply_chat_template(tokenizer, [MESSAGES], tokenize=False) == ["hellotwo"]
