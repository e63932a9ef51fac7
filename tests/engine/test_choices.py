"""Pieces tell what choices have at their end: tokens in order, texts that join, one last piece each."""

import pytest

from refold.engine.engine import Engine
from refold.engine.exits import ExitRule
from refold.engine.results import Piece
from refold.engine.settings import Drafts, EngineSettings
from refold.generation.sampling import Sampling
from tests.engine.conftest import options

PROMPTS = ["The sea was calm", "naïve café ☃"]
RULE = ExitRule("top1", {}, lambda index, place: 4 if place % 3 == 2 else 2)


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory):
    from refold.conversion.convert import ConvertOptions, convert

    made = tmp_path_factory.mktemp("folded") / "model"
    convert(make_model("llama"), made, {"fold": {"loops": 2}, "exits": {}}, options=ConvertOptions(allow_larger=True))
    return made


def make(folder, **given) -> Engine:
    return Engine(folder, EngineSettings(**options(**given)), device="cpu")


def run(engine, prompts, sampling, cancel_after=None):
    """Returns requests that have ended, each with its pieces."""
    heard = []
    for prompt in prompts:
        request, pieces = engine.prepare(prompt, sampling), list[Piece]()
        request.listener = pieces.append
        engine.submit(request)
        heard.append((request, pieces))
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
        if steps == cancel_after:
            for request, _ in heard:
                engine.cancel(request)
    return heard


def require_told(request, pieces):
    """The rule: tokens are `token_ids`, those of a stop string included; texts join to `text`; one end, the last."""
    for number, choice in request.choices.items():
        own = [piece for piece in pieces if piece.choice == number]
        tokens = [piece.token for piece in own if piece.token is not None]
        assert "".join(piece.text for piece in own) == choice.text
        assert tuple(each.token for each in tokens) == choice.token_ids
        assert tuple(each.depth for each in tokens) == choice.depths
        assert [piece.is_last for piece in own] == [False] * (len(own) - 1) + [True]
        assert own[-1].reason == choice.reason
        if choice.logprobs is not None:
            assert tuple((each.token, each.logprob) for each in tokens) == choice.logprobs
            assert tuple(each.alternatives for each in tokens) == choice.alternatives


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"exits": RULE, "max_pending": 99},
        {"drafts": Drafts(tokens=4, adapt=False)},
        {"drafts": Drafts("lookup", tokens=4, adapt=False)},
    ],
    ids=["plain", "exits", "drafts", "lookup"],
)
def test_pieces_tell_what_the_choices_have(folder, given):
    engine = make(folder, **given)
    whole = engine.generate(PROMPTS[0], Sampling(max_new_tokens=24, ignore_eos=True))[0].text
    cases = [
        ({"max_new_tokens": 6, "n": 2, "temperature": 1.5, "logprobs": 3, "ignore_eos": True}, None),
        ({"max_new_tokens": 20, "stop": (whole[5:9], whole[6:8] + "never"), "logprobs": 1}, None),
        # High temperatures give bytes of many characters, whole and torn.
        ({"max_new_tokens": 12, "temperature": 9.0, "n": 2, "stop": "e"}, None),
        ({"max_new_tokens": 40, "n": 2, "ignore_eos": True, "stop": "zzzz"}, 4),
    ]
    reasons = set()
    for fields, cancel_after in cases:
        for request, pieces in run(engine, PROMPTS, Sampling(**fields), cancel_after):
            require_told(request, pieces)
            reasons |= {choice.reason for choice in request.choices.values()}
    assert reasons == {"stop", "length", "cancelled"}
    found = engine.generate(PROMPTS[0], Sampling(max_new_tokens=24, stop=whole[5:9]))[0].choices[0]
    # The tokens of a stop string stay, its text does not.
    assert found.text == whole[: whole.index(whole[5:9])]
    assert engine.tokenizer is not None
    assert whole[5:9] in engine.tokenizer.decode(list(found.token_ids))


def test_choices_that_never_began_tell_their_end(folder):
    engine = make(folder, max_rows=1)
    first, second = (heard := run(engine, PROMPTS[:2], Sampling(max_new_tokens=40, n=3), cancel_after=1))
    for _, pieces in heard:
        assert sorted((piece.choice, piece.reason) for piece in pieces if piece.is_last) == [
            (choice, "cancelled") for choice in range(3)
        ]
    assert first[0].is_finished
    assert second[0].is_finished
