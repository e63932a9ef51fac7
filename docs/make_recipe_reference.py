"""Writes docs/recipe-reference.md from the field docstrings of the recipe's sections."""

import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from refold.fields import Section, describe_fields
from refold.mixers import placement
from refold.recipe import drop as dropping
from refold.recipe import fold as folding
from refold.recipe import heal as heal_stage
from refold.recipe import low_rank, objectives, recipe, share_kv, width
from refold.recipe.heal import built_in_protocols
from refold.recipe.tying import TYING_INITS

TARGET = Path(__file__).parent / "recipe-reference.md"
SECTIONS: tuple[tuple[str, type[Section]], ...] = (
    ("the recipe", recipe.Recipe),
    ("fold", folding.Fold),
    ("fold.groups[]", folding.TiedGroup),
    ("relax with type: lora (left out: this)", recipe.LoraRelax),
    ("relax with type: prefix", recipe.PrefixRelax),
    ("relax.rank as a budget", recipe.RankShare),
    ("relax.rank as an energy", recipe.RankEnergy),
    ("factor", low_rank.Factor),
    ("calibration", recipe.Calibration),
    ("drop", dropping.Drop),
    ("drop.block", dropping.BlockDrop),
    ("drop.attention, drop.mlp", dropping.PartDrop),
    ("drop.sublayers", dropping.SublayerDrop),
    ("width", width.Width),
    ("mixers[] of every type", placement.MixerEntry),
    *((f"mixers[] with type: {mixer}", options) for mixer, options in placement.ENTRIES.items()),
    ("mixers[].depths, mixers[].except at regular distances", placement.Every),
    ("share_kv by a rule", share_kv.ShareRule),
    ("share_kv.from at a distance", share_kv.Back),
    ("share_kv as a list", share_kv.ShareEntry),
    ("exits", recipe.ExitPlacement),
    ("quantise", recipe.Quantise),
    ("vocabulary", recipe.VocabularyTrim),
    ("ignore_tensors[]", recipe.IgnoredTensor),
    ("heal[]", heal_stage.HealStage),
    ("heal[].objective", objectives.StageObjectives),
    *(
        (f"heal[].objective.{name}", options)
        for name, field in objectives.StageObjectives.model_fields.items()
        if name != "registered"
        for options in get_args(field.annotation)
        if options is not type(None)
    ),
    ("heal[].thaw", heal_stage.Thaw),
)


def render() -> str:
    """Returns the whole page."""
    lines = [
        "# Recipe reference",
        "",
        "Made by `python docs/make_recipe_reference.py` from the docstrings in `refold/blueprint` and `refold/mixers`.",
        "Every section and every key is optional unless it says *required*. Unknown keys are refused.",
    ]
    for title, section in SECTIONS:
        lines += ["", f"## {title}", "", " ".join((section.__doc__ or "").split()), "", "| key | default | meaning |"]
        lines += ["|---|---|---|"]
        told = describe_fields(section)
        for name, field in _own_fields(section).items():
            text = " ".join(told.get(name, "").split()).replace("|", "\\|")
            lines.append(f"| `{field.alias or name}` | {_default(field)} | {text} |")
    lines += ["", "## Starts of stored layers (`fold.init`)", "", "| name | rule |", "|---|---|"]
    lines += [f"| `{name}` | {init.summary} ([source]({init.url})) |" for name, init in TYING_INITS.items()]
    lines += ["", "## Healing protocols (`heal: {protocol: NAME, tokens: N}`)", ""]
    lines += ["| name | what it does |", "|---|---|"]
    lines += [f"| `{name}` | {description} |" for name, description in built_in_protocols().items()]
    return "\n".join(lines) + "\n"


def _own_fields(section: type[BaseModel]) -> dict[str, Any]:
    """The fields of a section; of a mixer those that not every mixer has, or has with the same default."""
    fields = section.model_fields
    if section is placement.MixerEntry or not issubclass(section, placement.MixerEntry):
        return fields
    common = placement.MixerEntry.model_fields
    return {
        name: field
        for name, field in fields.items()
        if name != "type" and (name not in common or field.default != common[name].default)
    }


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "*required*" if field.default_factory is None else ""
    if isinstance(field.default, BaseModel) or field.default in (None, (), ""):
        return ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{value}`"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if TARGET.read_text(encoding="utf-8") == render() else f"{TARGET} is stale: run {__file__}")
    TARGET.write_text(render(), encoding="utf-8")
