import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refold.generation.stream import Detokeniser
from refold.modeling.load import load_tokenizer

MIXED = "Naïve cafés — €5: 北京 🙂🙂🙂 e\u0301\n\n  indented\n"


@pytest.fixture(scope="module")
def byte_level(make_model):
    return load_tokenizer(make_model())


@pytest.fixture(scope="module")
def sentencepiece(material):
    return load_tokenizer(material / "models" / "stories260K")


def _pieces(tokenizer, prompt: list[int], new: list[int]) -> list[str]:
    detokeniser = Detokeniser(tokenizer, prompt)
    return [piece for piece in (*map(detokeniser.add, new), detokeniser.finish()) if piece]


@pytest.mark.parametrize("tokenizer", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("cut", [0, 1, 9, 30])
def test_pieces_are_the_text_and_whole_characters(tokenizer: str, cut: int, request: pytest.FixtureRequest):
    chosen = request.getfixturevalue(tokenizer)
    ids = chosen(MIXED, add_special_tokens=False)["input_ids"]
    whole = [place for place in range(cut + 1) if "\ufffd" not in chosen.decode(ids[:place])][-1]
    pieces = _pieces(chosen, ids[:whole], ids[whole:])
    text = chosen.decode(ids, clean_up_tokenization_spaces=False)
    assert chosen.decode(ids[:whole], clean_up_tokenization_spaces=False) + "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 3


def test_a_space_at_the_front_of_the_first_token_is_kept(sentencepiece):
    ids = sentencepiece("Once upon a time there", add_special_tokens=False)["input_ids"]
    place = next(index for index, name in enumerate(sentencepiece.convert_ids_to_tokens(ids)) if index and "▁" in name)
    assert "".join(_pieces(sentencepiece, ids[:place], ids[place:])).startswith(" ")
    # Control: decoded by themselves the same tokens have lost it.
    assert not sentencepiece.decode(ids[place:]).startswith(" ")


def test_a_character_waits_until_it_is_whole(byte_level):
    ids = byte_level("a🙂", add_special_tokens=False)["input_ids"]
    assert len(ids) > 2
    detokeniser = Detokeniser(byte_level)
    pieces = [detokeniser.add(token) for token in ids]
    assert pieces[-1].endswith("🙂")
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_tail_of_a_character_that_never_ends_is_not_lost(byte_level):
    first = byte_level.convert_tokens_to_ids("ð")  # byte F0, the first of four
    assert _pieces(byte_level, [], [first]) == ["\ufffd"]


@given(ids=st.lists(st.integers(3, 299), max_size=12))
@settings(max_examples=50, deadline=None)
def test_any_tokens_in_pieces_are_what_they_decode_to_at_once(ids: list[int], byte_level):
    assert "".join(_pieces(byte_level, [], ids)) == byte_level.decode(ids, clean_up_tokenization_spaces=False)
