"""Constraints: every text that ends has the asked form, whatever the other settings are."""

import json
import re

import pytest
import torch

from refold.engine.engine import Engine
from refold.engine.exits import ExitRule
from refold.engine.grammars import Grammars, check_constraint
from refold.engine.settings import Drafts, EngineSettings
from refold.errors import RefoldError
from refold.generation.constraint import Constraint
from refold.generation.sampling import Sampling
from refold.modeling.load import load_tokenizer
from refold.serve.messages import GenerationJob, read_to_engine, write_line

pytest.importorskip("llguidance", reason="the extra `serve` is not installed")
jsonschema = pytest.importorskip("jsonschema", reason="jsonschema, which checks the texts, is not installed")
MODEL = "refold/shipped/stdlib-5m"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["cat", "dög", 3, None]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,4}$"}, "maxItems": 3},
        "at": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["name", "kind", "at"],
    "additionalProperties": False,
    "$defs": {"point": {"type": "array", "items": {"type": "number", "minimum": -1, "maximum": 1}, "minItems": 2,
                        "maxItems": 2}},
}  # fmt: skip
SHORT_SCHEMA = {
    "type": "object",
    "properties": {"kind": SCHEMA["properties"]["kind"], "tags": SCHEMA["properties"]["tags"]},
    "required": ["kind"],
    "additionalProperties": False,
}
HOT = {"max_new_tokens": 200, "temperature": 2.0}


@pytest.fixture(scope="module")
def folded(make_model, tmp_path_factory):
    from refold.conversion.convert import ConvertOptions, convert

    made = tmp_path_factory.mktemp("folded") / "model"
    convert(make_model("llama"), made, {"fold": {"loops": 2}, "exits": {}}, options=ConvertOptions(allow_larger=True))
    return made


@pytest.fixture(scope="module")
def engine(folded) -> Engine:
    return Engine(folded, EngineSettings(weights="float32", max_rows=16), device="cpu")


def texts(engine, constraint, count, **given):
    """Texts of many seeds; those that ran out of tokens are left out."""
    fields = {**HOT, "constraint": constraint, **given}
    found = engine.generate(["x = "] * count, [Sampling(seed=seed, **fields) for seed in range(count)])
    choices = [choice for each in found for choice in each.choices]
    assert {choice.reason for choice in choices} <= {"stop", "length"}
    ended = [choice.text for choice in choices if choice.reason == "stop"]
    assert len(ended) >= len(choices) / 2
    return ended


def test_every_text_of_a_schema_validates(engine):
    require_valid_texts(engine, count=3)


@pytest.mark.long
def test_every_text_of_a_trained_model_validates():
    require_valid_texts(Engine(MODEL, EngineSettings(max_rows=16, max_context=320), device="cpu"), count=150)


def require_valid_texts(engine, count):
    found = texts(engine, Constraint.schema(SCHEMA), count, n=2)
    for text in found:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(found)) > count
    # Without the constraint no text does: the comparison can fail.
    plain = engine.generate(["x = "] * 3, [Sampling(seed=seed, **{**HOT, "max_new_tokens": 20}) for seed in range(3)])
    for each in plain:
        with pytest.raises((ValueError, jsonschema.ValidationError)):
            jsonschema.validate(json.loads(each.text), SCHEMA)


def test_json_objects_expressions_and_strings_keep_their_forms(engine):
    for text in texts(engine, Constraint("json"), count=4, temperature=1.0):
        assert isinstance(json.loads(text), dict)
    for text in texts(engine, Constraint("regex", r"[a-f]{2,5}(-[0-9]{1,3}|/é)"), count=6, top_k=50):
        assert re.fullmatch(r"[a-f]{2,5}(-[0-9]{1,3}|/é)", text)
    strings = ("yes", "no", "a+b (c)?", "line\nbreak", "né")
    found = set(texts(engine, Constraint.one_of(strings), count=12, temperature=50.0, top_p=0.99))
    assert found <= set(strings)
    assert len(found) > 2


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.0},
        {"min_p": 0.01, "presence_penalty": 1.0, "repetition_penalty": 1.2},
        {"top_p": 0.5, "n": 3},
        {"logprobs": 2, "prompt_logprobs": 1},
    ],
)
def test_other_settings_go_with_a_constraint(engine, given):
    for text in texts(engine, Constraint.schema(SHORT_SCHEMA), count=2, **given):
        jsonschema.validate(json.loads(text), SHORT_SCHEMA)


def test_log_probabilities_are_those_of_the_model_without_the_constraint(engine):
    sampling = Sampling(max_new_tokens=60, logprobs=2, constraint=Constraint.one_of(["zebra crossing"]))
    choice = engine.generate(["x = "], sampling)[0].choices[0]
    assert choice.text == "zebra crossing"
    ids = list(engine.prepare("x = ").prompt_ids)
    assert choice.logprobs is not None
    for token, told in zip(choice.token_ids, choice.logprobs, strict=True):
        with torch.no_grad():
            expected = engine.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        assert told.logprob == pytest.approx(float(expected[token]), abs=1e-3)
        ids.append(token)
    assert min(each.logprob for each in choice.logprobs) < -3


def test_an_end_token_comes_only_where_the_text_is_whole(engine):
    """Its logit is pushed up as far as settings allow; here it is also a letter that strings may have."""
    (end,) = engine._ends
    pushed = texts(engine, Constraint.schema(SHORT_SCHEMA), count=2, logit_bias={end: 100.0}, temperature=0.5)
    for text in pushed:
        jsonschema.validate(json.loads(text), SHORT_SCHEMA)
    digits = texts(engine, Constraint("regex", "[0-9]+"), count=4, logit_bias={end: 100.0}, temperature=0.5)
    assert {len(text) for text in digits} == {1} or all(text.isdigit() for text in digits)
    stopped = engine.generate("x = ", Sampling(constraint=Constraint("regex", "[0-9]{3}zz"), stop="z"))[0]
    assert re.fullmatch("[0-9]{3}", stopped.text)
    assert stopped.choices[0].stop == "z"


@pytest.mark.parametrize("way", ["exits", "drafts", "lookup", "copy", "recompute"])
def test_constraints_hold_with_exits_drafts_and_preemption(folded, way):
    settings = {
        "exits": {"exits": ExitRule("top1", {}, lambda index, place: 4 if place % 3 == 2 else 2), "max_pending": 99},
        "drafts": {"drafts": Drafts(tokens=4, adapt=False)},
        "lookup": {"drafts": Drafts("lookup", tokens=4, adapt=False)},
        "copy": {"preemption": "copy", "memory": 40_000},
        "recompute": {"preemption": "recompute", "memory": 40_000},
    }[way]
    engine = Engine(folded, EngineSettings(page_size=4, max_rows=4, chunk=16, **settings), device="cpu")
    constraint = Constraint("regex", "[a-d]{6,9}e[0-9]{20}")
    sampling = [Sampling(max_new_tokens=60, temperature=1.5, seed=seed, constraint=constraint) for seed in range(6)]
    free = Sampling(max_new_tokens=20, temperature=1.0)
    found = engine.generate(["It was"] * 8, [*sampling, free, free])
    for each in found[:6]:
        assert re.fullmatch("[a-d]{6,9}e[0-9]{20}", each.text)
        assert each.choices[0].reason == "stop"
    report = engine.statistics()
    if way == "exits":
        assert {depth for each in found[:6] for depth in each.choices[0].depths} == {2, 4}
    if "memory" in settings:
        assert report.preemptions
    assert (report.running, report.used_pages) == (0, 0)


@pytest.mark.parametrize(
    ("kind", "text", "match"),
    [
        ("yaml", "", "constraint.kind: .*json"),
        ("json", "{}", "constraint.text: must be at most 0 characters"),
        ("schema", "{", "constraint.text: JSON is required"),
        ("schema", "[]", "constraint.text: a JSON schema is required"),
        ("schema", '{"a":' * 9000, "constraint.text: must be at most 32768 characters"),
        ("schema", "[" * 9000, "constraint.text: JSON is required"),
        ("regex", "", "constraint.text: a regular expression is required"),
        ("strings", "[]", "constraint.text: a JSON list of strings"),
        ("strings", '["a", 1]', "constraint.text: a JSON list of strings"),
        ("strings", json.dumps(["a"] * 1001), "constraint.text: must be at most 1000 strings"),
    ],
)
def test_constraints_without_sense_are_refused(kind, text, match):
    with pytest.raises(RefoldError, match=match):
        Constraint(kind, text)


@pytest.mark.parametrize(
    ("kind", "text", "match"),
    [
        ("schema", '{"type": "objekt"}', "objekt"),
        ("schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("schema", '{"x-guidance": {"lenient": true}, "type": "array", "uniqueItems": true}', "uniqueItems"),
        ("schema", '{"$ref": "file:///etc/passwd"}', "not present"),
        ("schema", '{"oneOf": [{"type": "string"}, {"type": "integer"}, {"minimum": 3}]}', "oneOf"),
        ("regex", "[0-9", "a form that llguidance takes"),
        ("regex", "(?=a)b", "a form that llguidance takes"),
        ("regex", "(" * 1000 + "a" + ")" * 1000, "a form that llguidance takes"),
    ],
)
def test_constraints_that_the_library_refuses_are_told(engine, kind, text, match):
    with pytest.raises(RefoldError, match=f"^constraint: .*{match}"):
        engine.generate("x", Sampling(constraint=Constraint(kind, text)))
    assert not engine.has_work


COSTLY = [
    {"type": "integer", "multipleOf": 1_000_003},
    {"allOf": [{"type": "string", "pattern": f".*{at}.{{30}}"} for at in range(30)]},
]


@pytest.mark.parametrize("schema", [COSTLY[0], pytest.param(COSTLY[1], marks=pytest.mark.long)])
def test_a_check_beside_the_server_bounds_the_time_of_compiling(schema):
    with pytest.raises(RefoldError, match="constraint: a form that is quick to compile is required"):
        check_constraint(Constraint.schema(schema))


def test_a_check_passes_what_compiles_and_tells_what_does_not():
    check_constraint(Constraint.schema(SCHEMA))
    with pytest.raises(RefoldError, match=r"^constraint: .*objekt"):
        check_constraint(Constraint("schema", '{"type": "objekt"}'))


def test_the_table_is_made_once_and_compiled_forms_are_kept(monkeypatch):
    grammars, made = Grammars(load_tokenizer(MODEL), 2048, [0]), []
    make_table = grammars._make_table
    monkeypatch.setattr(grammars, "_make_table", lambda: made.append(1) or make_table())
    first = grammars.compile(Constraint("regex", "a+"))
    assert grammars.compile(Constraint("regex", "a+")) is first
    for count in range(1, 20):
        grammars.compile(Constraint("regex", f"a{{{count}}}"))
    assert grammars.compile(Constraint("regex", "a+")) is not first
    assert made == [1]
    state, other = first.begin(), first.begin()
    allowed = state.allowed(2048)
    assert 0 < allowed.sum() < 20
    state.advance(int(allowed.nonzero()[0][0]))
    assert state.allowed(2048)[0]
    assert not other.allowed(2048)[0]
    with pytest.raises(RefoldError, match="constraint: a tokenizer is required"):
        Grammars(None, 10).compile(Constraint("json"))


def test_without_the_library_the_extra_is_named(engine, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(RefoldError, match=r"constraint: the package llguidance is required; install refold\[serve\]"):
        engine.generate("x", Sampling(constraint=Constraint("json")))


def test_settings_and_messages_carry_constraints():
    job = GenerationJob(id=1, prompt_ids=(1,), sampling=Sampling(constraint=Constraint.schema(SCHEMA)))
    assert read_to_engine(write_line(job)) == job
    given = {"kind": "regex", "text": "a"}
    assert Sampling(constraint=given).constraint == Constraint("regex", "a")  # type: ignore[arg-type]
    with pytest.raises(RefoldError, match="constraint: the fields are kind and text"):
        Constraint.read({"kind": "json", "schema": {}})
    with pytest.raises(RefoldError, match="constraint: no ignore_eos is required beside it"):
        Sampling(constraint=Constraint("json"), ignore_eos=True)
