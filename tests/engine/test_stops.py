from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from refold.engine.stops import ChoiceText
from refold.errors import RefoldError
from refold.generation.sampling import Sampling
from refold.modeling.load import load_tokenizer

MIXED = "Naïve cafés — €5: 北京 🙂🙂🙂 e\u0301\n\n  indented\n"
END = 2


@pytest.fixture(scope="module")
def byte_level(make_model):
    return load_tokenizer(make_model())


@pytest.fixture(scope="module")
def sentencepiece(material):
    return load_tokenizer(material / "models" / "stories260K")


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def read(tokenizer: Any, new: list[int], room: int = 999, **settings: Any) -> tuple[ChoiceText, list[str]]:
    """The choice after its tokens, and the pieces that were taken after each token and at the end."""
    choice = ChoiceText(tokenizer, [5, 6], Sampling(**settings), [END], room)
    pieces = []
    for token in new:
        ended = choice.add(token)
        pieces.append(choice.take())
        if ended:
            break
    pieces.append(choice.take())
    return choice, pieces


def quietly(tokenizer: Any, new: list[int], room: int = 999, **settings: Any) -> ChoiceText:
    choice = ChoiceText(tokenizer, [5, 6], Sampling(**settings), [END], room)
    for token in new:
        if choice.add(token):
            break
    return choice


def test_an_end_token_ends_and_is_no_new_token(byte_level):
    choice, pieces = read(byte_level, [*ids_of(byte_level, "The sea"), END, 7])
    assert (choice.reason, choice.stop, choice.text) == ("stop", END, "The sea")
    assert choice.token_ids == ids_of(byte_level, "The sea")
    assert "".join(pieces) == "The sea"


def test_an_end_token_may_be_ignored(byte_level):
    ids = [*ids_of(byte_level, "The"), END, *ids_of(byte_level, " sea")]
    choice = quietly(byte_level, ids, room=len(ids), ignore_eos=True)
    assert (choice.reason, choice.stop, choice.token_ids) == ("length", None, ids)
    assert choice.text == "The sea"


def test_the_number_of_tokens_ends(byte_level):
    ids = ids_of(byte_level, "The sea was calm")
    choice = quietly(byte_level, ids, room=3)
    assert (choice.reason, choice.stop, choice.token_ids) == ("length", None, ids[:3])
    assert choice.add(9)
    assert choice.token_ids == ids[:3]


@pytest.mark.parametrize("tokenizer", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("stop", ["calm", "lm, ", "sea", "e", "🙂", "北京", "\n\n", "m — "])
def test_a_stop_string_ends_before_it_across_tokens(tokenizer: str, stop: str, request: pytest.FixtureRequest):
    chosen, text = request.getfixturevalue(tokenizer), "The sea was calm, — 北京 🙂\n\nend"
    text = text.replace("m,", "m —") if "—" in stop else text
    choice, pieces = read(chosen, ids_of(chosen, text), stop=stop)
    whole = quietly(chosen, ids_of(chosen, text)).text
    assert stop in whole
    assert (choice.reason, choice.stop) == ("stop", stop)
    assert choice.text == whole[: whole.index(stop)] == "".join(pieces)
    assert quietly(chosen, ids_of(chosen, text), stop=stop).text == choice.text
    # No piece shows the beginning of the stop string, and its tokens are kept.
    assert len(choice.token_ids) < len(ids_of(chosen, text))


@pytest.mark.parametrize("tokenizer", ["byte_level", "sentencepiece"])
def test_pieces_are_the_text_and_whole_characters(tokenizer: str, request: pytest.FixtureRequest):
    chosen = request.getfixturevalue(tokenizer)
    given: list[dict[str, Any]] = [{}, {"stop": ["never", "indenture", "🙂🙂🙂🙂"]}]
    for settings in given:
        choice, pieces = read(chosen, ids_of(chosen, MIXED), **settings)
        assert not choice.is_ended
        choice.end("cancelled")
        assert choice.reason == "cancelled"
        pieces.append(choice.take())
        assert "".join(pieces) == choice.text == quietly(chosen, ids_of(chosen, MIXED)).text
        assert not any("\ufffd" in piece for piece in pieces)
        assert choice.take() == ""


def test_a_withheld_beginning_comes_with_the_end(byte_level):
    ids = ids_of(byte_level, "The sea")
    choice, pieces = read(byte_level, ids, room=len(ids), stop="sealed")
    assert (choice.reason, choice.text) == ("length", "The sea")
    assert "".join(pieces[:-2]) == "The "[: len("".join(pieces[:-2]))]
    assert "".join(pieces) == "The sea"


def test_a_stop_string_in_the_last_token_is_the_reason(byte_level):
    ids = ids_of(byte_level, "The sea")
    choice = quietly(byte_level, ids, room=len(ids), stop="sea")
    assert (choice.reason, choice.stop, choice.text) == ("stop", "sea", "The ")


def test_a_character_that_never_ends_is_not_lost_and_may_be_a_stop_string(byte_level):
    half = byte_level.convert_tokens_to_ids("ð")  # byte F0, the first of four
    assert quietly(byte_level, [7, half], room=2).text.endswith("\ufffd")
    choice = quietly(byte_level, [7, half], room=2, stop="\ufffd")
    assert (choice.reason, choice.stop) == ("stop", "\ufffd")
    assert not choice.text.endswith("\ufffd")


def test_what_has_ended_keeps_its_reason(byte_level):
    choice = quietly(byte_level, [END])
    choice.end("cancelled")
    assert (choice.reason, choice.text, choice.token_ids) == ("stop", "", [])


def test_without_stop_strings_nothing_is_decoded_before_it_is_asked_for(byte_level, monkeypatch: pytest.MonkeyPatch):
    choice = ChoiceText(byte_level, [5], Sampling(), [END], 50)
    decoded = []
    monkeypatch.setattr(choice._detokeniser, "_decode", lambda tokens: decoded.append(tokens) or "x" * len(tokens))
    for token in range(10, 60):
        choice.add(token)
    assert decoded == []
    assert len(choice.text) == 50
    assert len(decoded) <= 4


def test_without_a_tokenizer_there_is_no_text():
    choice = quietly(None, [7, 8, END])
    assert (choice.reason, choice.text, choice.take(), choice.token_ids) == ("stop", "", "", [7, 8])
    with pytest.raises(RefoldError, match=r"stop: a tokenizer is required for stop strings \(got none, and 'x'\)"):
        ChoiceText(None, [5], Sampling(stop="x"), [END], 5)


@hypothesis.given(
    ids=st.lists(st.integers(2, 299), max_size=12),
    stop=st.lists(st.text(" aehst\ufffd", min_size=1, max_size=3), max_size=2),
    room=st.integers(1, 14),
)
def test_any_tokens_give_the_same_text_in_pieces_and_at_once(ids, stop, room, byte_level):
    choice, pieces = read(byte_level, ids, room, stop=stop)
    choice.end("cancelled")
    pieces.append(choice.take())
    alone = quietly(byte_level, ids, room, stop=stop)
    alone.end("cancelled")
    assert "".join(pieces) == choice.text == alone.text
    assert (choice.reason, choice.stop, choice.token_ids) == (alone.reason, alone.stop, alone.token_ids)
    assert not any(each in choice.text for each in stop)
