"""The recipe of a choice, which `refold convert` carries out unchanged."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from refold.blueprint.schema import POOLS
from refold.families.arch import ArchSpec
from refold.fitting.kinds.kind import PartKind
from refold.fitting.kinds.registry import PART_KINDS
from refold.fitting.menu import FitChoice, MatrixForm
from refold.recipe.quantise import FLOAT, OUTER_SCHEME
from refold.recipe.recipe import Recipe

WEIGHT = "fisher"
"""Error metric of all fits: losses were predicted with it."""
FULL = "full"
WIDTH = 100
"""Characters of a line."""
_SCHEME_WITHOUT_LINEARS = "int8"
_OUTER_KEYS = {"embedding": "embeddings", "head": "head"}
LayerForms = dict[str, dict[int, MatrixForm]]
"""Forms by linear and source layer."""


def recipe_of(
    choice: FitChoice, arch: ArchSpec, description: str = "", kinds: Sequence[PartKind] = PART_KINDS
) -> dict[str, Any]:
    """Returns the recipe of a choice as a mapping of sections.

    Lists have one entry for each source layer; layers without the linear have the entry that is most frequent, which
    nothing reads. A linear with one value everywhere is written once where the key allows it. Both layers of a tie have
    the entry of the shared matrix.

    Args:
        choice: The choice.
        arch: The source.
        description: One line about the recipe.
        kinds: The kinds of the chosen forms.
    """
    recipe: dict[str, Any] = {"description": description} if description else {}
    for kind in kinds:
        for pool in POOLS:
            of_pool = sorted((part for part in choice.parts if part.pool == pool), key=lambda part: part.layer)
            chosen = {part.layer: part.form for part in of_pool if part.form.kind == kind.name}
            if chosen:
                kind.write(recipe, arch, chosen, pool)
    forms = _forms_of_layers(choice)
    _write_ties(recipe, choice)
    _write_ranks(recipe, arch, forms)
    _write_schemes(recipe, arch, forms, choice)
    order = list(Recipe.model_fields)
    return dict(sorted(recipe.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def recipe_text(recipe: Mapping[str, Any], comments: Iterable[str] = ()) -> str:
    """Returns a recipe as YAML with comment lines above it, lists of plain values in one line.

    Args:
        recipe: The recipe as a mapping.
        comments: Paragraphs, such as the budget and the predicted loss.
    """
    lines = [line for paragraph in comments for line in textwrap.wrap(" ".join(paragraph.split()), WIDTH - 2)]
    head = "".join(f"# {line}\n" for line in lines)
    return head + yaml.dump(
        dict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=WIDTH, default_flow_style=False
    )


class _Dumper(yaml.SafeDumper):
    """Writes lists of plain values, and mappings in lists, in one line."""

    def represent_plain_list(self, values: Sequence[Any]) -> yaml.Node:
        is_plain = not any(isinstance(each, list | tuple) for each in values)
        return self.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=is_plain and bool(values))

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(list, _Dumper.represent_plain_list)
_Dumper.add_representer(tuple, _Dumper.represent_plain_list)


def _forms_of_layers(choice: FitChoice) -> LayerForms:
    found: LayerForms = {}
    for part in sorted(choice.parts, key=lambda part: (part.layer, POOLS.index(part.pool))):
        for name, form in part.matrices.items():
            found.setdefault(name, {})[part.layer] = form
    for tie, forms in choice.ties:
        for name, form in forms.items():
            found.setdefault(name, {}).update(dict.fromkeys(tie.layers, form))
    return found


def _linears_of_pools(choice: FitChoice) -> dict[str, list[str]]:
    found: dict[str, dict[str, None]] = {}
    for part in choice.parts:
        found.setdefault(part.pool, {}).update(dict.fromkeys(part.matrices))
    for tie, forms in choice.ties:
        found.setdefault(tie.pool, {}).update(dict.fromkeys(forms))
    return {pool: list(names) for pool, names in found.items()}


def _write_ties(recipe: dict[str, Any], choice: FitChoice) -> None:
    if not choice.ties:
        return
    groups: dict[tuple[int, ...], list[str]] = {}
    for tie, _ in sorted(choice.ties, key=lambda each: (each[0].layers, POOLS.index(each[0].pool))):
        groups.setdefault(tie.layers, []).append(tie.pool)
    written = [{"layers": list(layers), "tie": pools} for layers, pools in groups.items()]
    recipe["fold"] = {"groups": written, "init": "average"}
    # With `init: svd` and without LoRAs the shared weight is the weighted mean.
    recipe["relax"] = {"rank": 0, "init": "svd", "vectors": "own", "weight": WEIGHT}


def _write_ranks(recipe: dict[str, Any], arch: ArchSpec, forms: LayerForms) -> None:
    ranks: dict[str, list[int | str]] = {}
    for name, of_layers in forms.items():
        if any(form.rank is not None for form in of_layers.values()):
            given = {layer: FULL if form.rank is None else form.rank for layer, form in of_layers.items()}
            ranks[name] = [given.get(layer, FULL) for layer in range(arch.num_layers)]
    if ranks:
        recipe["factor"] = {"ranks": ranks, "weight": WEIGHT}


def _write_schemes(recipe: dict[str, Any], arch: ArchSpec, forms: LayerForms, choice: FitChoice) -> None:
    schemes = {
        name: {layer: form.scheme or FLOAT for layer, form in of_layers.items()} for name, of_layers in forms.items()
    }
    counted = Counter(scheme for of_layers in schemes.values() for scheme in of_layers.values())
    outer_schemes = {_OUTER_KEYS[name]: form.scheme or FLOAT for name, form in choice.outer.items()}
    if set(counted) <= {FLOAT} and set(outer_schemes.values()) <= {FLOAT}:
        return
    frequent = [scheme for scheme, _ in counted.most_common() if scheme != FLOAT]
    usual = frequent[0] if frequent else _SCHEME_WITHOUT_LINEARS
    keep = {name: scheme for name, scheme in outer_schemes.items() if scheme != OUTER_SCHEME}
    layers: dict[str, list[str]] = {}
    for name, of_layers in schemes.items():
        values = Counter(of_layers.values()).most_common()
        if len(values) > 1:
            layers[name] = [of_layers.get(layer, values[0][0]) for layer in range(arch.num_layers)]
        elif values[0][0] != usual:
            keep[name] = values[0][0]
    for pool, names in _linears_of_pools(choice).items():
        kept = {keep.get(name) for name in names}
        if len(names) > 1 and len(kept) == 1 and None not in kept:
            keep = {**{name: scheme for name, scheme in keep.items() if name not in names}, pool: keep[names[0]]}
    section: dict[str, Any] = {"to": usual}
    if keep:
        section["keep"] = keep
    if layers:
        section["layers"] = layers
    recipe["quantise"] = section
