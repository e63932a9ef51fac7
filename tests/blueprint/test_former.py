"""Blueprints of earlier versions, with `type` and `options` as separate keys of a mixer, and with former names."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from refold.blueprint.cost import cost
from refold.blueprint.former import current_names
from refold.blueprint.schema import Blueprint, MixerPart
from refold.blueprint.tensors import target_tensors
from refold.mixers.registry import MIXERS

WRITTEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "former_blueprints.json").read_text())
"""By mixer: the blueprint with LoRAs and factors, its cost, and its tensors with their shapes."""


def test_every_mixer_has_one() -> None:
    assert WRITTEN.keys() == MIXERS.keys()


@pytest.mark.parametrize("kind", WRITTEN)
def test_it_costs_and_stores_the_same(kind: str) -> None:
    written = WRITTEN[kind]
    found = Blueprint.model_validate(written["blueprint"])
    assert found.mixers[0].mixer.type == kind
    assert cost(found, 2).model_dump(mode="json") == written["cost"]
    now = current_names(found, written["tensors"])
    shapes = {name: written["tensors"][stored] for name, stored in now.items()}
    assert shapes == {tensor.name: list(tensor.shape) for tensor in target_tensors(found)}


@pytest.mark.parametrize("kind", WRITTEN)
def test_options_are_the_ones_written(kind: str) -> None:
    part = WRITTEN[kind]["blueprint"]["mixers"][0]
    mixer = Blueprint.model_validate(WRITTEN[kind]["blueprint"]).mixers[0].mixer
    assert part["options"].items() <= mixer.model_dump(mode="json").items()


@pytest.mark.parametrize("kind", WRITTEN)
def test_it_is_written_in_the_new_form_and_read_back(kind: str) -> None:
    found = Blueprint.model_validate(WRITTEN[kind]["blueprint"])
    plain = json.loads(found.model_dump_json())
    assert plain["mixers"][0]["mixer"]["type"] == kind
    assert not plain["mixers"][0].keys() & {"type", "options"}
    assert Blueprint.model_validate(plain) == found
    names = [tensor.name for tensor in target_tensors(found)]
    assert current_names(found, names) == {name: name for name in names}


def test_names_of_other_parts_stay() -> None:
    found = Blueprint.model_validate(WRITTEN["mamba"]["blueprint"])
    attention = next(index for index, part in enumerate(found.mixers) if part.mixer.type == "attention")
    for name in (f"model.mixers.{attention}.v_proj.weight", "model.mlps.0.conv.weight", "lm_head.weight", "v_proj"):
        assert current_names(found, [name]) == {name: name}
    swapped = found.depths[0]
    assert swapped.mixer != attention
    assert "in_proj_x" in swapped.ranks
    assert "v_proj" not in swapped.ranks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "glaa"}, r"must be one of .*\(got 'glaa'\); did you mean 'gla'\?"),
        ({"type": None}, r"must be one of .*\(got None\)"),
        ({"type": ["gla"]}, r"must be one of"),
        ({"options": {"heads": 4}}, r"options resolved against the source are required"),
        ({"options": {"heads": 3}}, r"mixers\[0\]\.mixer\.key_dim: required where 3 heads do not divide"),
        ({"options": "none"}, r"must be a mapping \(got 'none'\)"),
        ({"options": {"decay_rnk": 2}}, r"(?s)decay_rnk.*Extra inputs are not permitted"),
    ],
)
def test_a_damaged_one_is_refused(change: dict[str, Any], message: str) -> None:
    data = copy.deepcopy(WRITTEN["gla"]["blueprint"])
    data["mixers"][0] |= change
    with pytest.raises(ValidationError, match=message):
        Blueprint.model_validate(data)


def test_a_part_without_a_type_is_attention() -> None:
    assert MixerPart.model_validate({"sources": [1], "options": {}}) == MixerPart(sources=(1,))
