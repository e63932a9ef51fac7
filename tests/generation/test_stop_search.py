import pytest
from hypothesis import given
from hypothesis import strategies as st

from refold.generation.stop_search import StopSearch

TEXT = st.text("abc", max_size=12)


def _search(stops: list[str], pieces: list[str]) -> tuple[list[str], str | None]:
    search = StopSearch(stops)
    given_out = [search.add(piece) for piece in pieces]
    return [*given_out, search.finish()], search.found


@pytest.mark.parametrize(
    ("stops", "pieces", "expected", "found"),
    [
        (["STOP"], ["a S", "TO", "P b"], ["a ", "", "", ""], "STOP"),
        (["STOP"], ["a S", "TO", "Q b"], ["a ", "", "STOQ b", ""], None),
        (["STOP"], ["a S"], ["a ", "S"], None),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", "", ""], "\n\n"),
        (["bcd", "abcde"], ["xab", "c", "d"], ["x", "", "a", ""], "bcd"),
        (["aab"], ["aa", "a", "b"], ["", "a", "", ""], "aab"),
        ([], ["a", "b"], ["a", "b", ""], None),
    ],
)
def test_text_that_may_be_a_stop_string_is_withheld(stops: list[str], pieces: list[str], expected: list[str], found):
    assert _search(stops, pieces) == (expected, found)


def test_text_after_the_stop_string_is_dropped():
    search = StopSearch(["x"])
    assert [search.add("ax"), search.add("b"), search.finish()] == ["a", "", ""]


@given(stops=st.lists(TEXT.filter(bool), max_size=3), pieces=st.lists(TEXT, max_size=8))
def test_pieces_give_what_the_whole_text_gives(stops: list[str], pieces: list[str]):
    text = "".join(pieces)
    ends = [(end, -len(stop), stop) for stop in stops for end in range(len(text) + 1) if text[:end].endswith(stop)]
    expected = (text, None) if not ends else (text[: min(ends)[0] + min(ends)[1]], min(ends)[2])
    given_out, found = _search(stops, pieces)
    assert ("".join(given_out), found) == expected


@given(stops=st.lists(TEXT.filter(bool), min_size=1, max_size=3), pieces=st.lists(TEXT, max_size=8))
def test_no_more_is_withheld_than_needed(stops: list[str], pieces: list[str]):
    search, text, shown = StopSearch(stops), "", ""
    for piece in pieces:
        text += piece
        shown += search.add(piece)
        if search.found is not None:
            break
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)
