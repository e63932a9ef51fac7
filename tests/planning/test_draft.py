"""Drafts without measurements, plans, and kinds of notes."""

import json

import pytest
from pydantic import ValidationError

from refold.planning.notes import Note
from refold.planning.plan import Draft, Plan, plan_model, read_plan, replan
from refold.recipe.load import load_recipe
from refold.recipe.recipe import ResolvedRecipe
from refold.sources.source_model import read_source_model

MEASURED = {"factor": {"parameters": 0.6, "split": "measured"}}


def draft(source, sections) -> Draft:
    return plan_model(read_source_model(source), load_recipe(sections), allow_larger=True)


def test_a_draft_names_what_is_to_be_measured_and_a_settled_plan_does_not(make_source):
    made = draft(make_source(), MEASURED)
    assert [note.kind for note in made.pending] == ["pending"]
    settled = made.settle()
    assert isinstance(settled, Plan)
    assert not [note for note in settled.notes if note.kind == "pending"]
    assert [note.text for note in settled.notes] == [note.text for note in made.notes]
    assert settled.blueprint == made.blueprint
    assert not draft(make_source(), {"fold": {"loops": 2}}).pending


def test_a_new_blueprint_ends_what_was_pending_and_keeps_facts(make_source):
    source = make_source()
    made = draft(source, {**MEASURED, "fold": {"loops": 2, "uneven": "drop"}, "drop": {"block": {"layers": [0]}}})
    facts = [note for note in made.notes if note.kind == "fact"]
    again = replan(made, read_source_model(source), made.blueprint)
    assert made.pending
    assert not again.pending
    assert [note for note in again.notes if note.kind == "fact"] == facts


def test_a_plan_written_with_plain_notes_is_read(make_source, tmp_path):
    plan = draft(make_source(), {"fold": {"loops": 2}}).settle()
    fields = plan.model_dump(mode="json")
    old = {**fields, "notes": [note["text"] for note in fields["notes"]]}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(old))
    assert read_plan(path).notes == tuple(Note(text=note.text) for note in plan.notes)
    path.write_text(plan.model_dump_json())
    assert read_plan(path) == plan


def test_an_unresolved_recipe_is_no_resolved_one():
    recipe = load_recipe({"fold": {"loops": 2}})
    assert recipe.fold is not None
    assert recipe.fold.init is None
    resolved = recipe.resolved()
    assert isinstance(resolved, ResolvedRecipe)
    assert resolved.resolved() is resolved
    with pytest.raises(ValidationError, match=r"fold\.init: required in a resolved recipe"):
        ResolvedRecipe.model_validate(recipe.model_dump(by_alias=True))
