"""Choices that an engine can run: forms whose export would lose or repeat something leave the menu."""

from collections.abc import Mapping, Sequence
from typing import Any

from refold.blueprint.cost import count_weight_bytes
from refold.blueprint.quantisation import without_schemes
from refold.blueprint.schema import Blueprint
from refold.blueprint.tensors import float_tensors
from refold.errors import RecipeError, RefoldError
from refold.exporting.registry import targets_for
from refold.exporting.target import ExportOptions, ExportTarget
from refold.families.arch import ArchSpec
from refold.fitting.kinds.registry import find_kind
from refold.fitting.look import STORED_BYTES
from refold.fitting.menu import MatrixForm, Menu, MenuMatrix, PartForm, PartMenu
from refold.fitting.single_methods import DTYPES
from refold.planning.build import build_blueprint, identity_blueprint
from refold.recipe.load import load_recipe

MOST_LARGER = 1.15
"""Bytes of an export over those of the model at most: formats have headers, and blocks with more scales than ours."""


class EngineLimits:
    """Judges forms by exporting targets of an engine, each kind of form once.

    Args:
        engine: An engine or a target, as for `refold plan --for`.
        arch: The source.

    Raises:
        ExportError: There is no such engine or target.
    """

    def __init__(self, engine: str, arch: ArchSpec):
        self.engine, self._arch = engine, arch
        self._targets: Sequence[ExportTarget] = targets_for(engine)
        self._known: dict[object, float | None] = {}

    def restrict(self, menu: Menu) -> Menu:
        """Returns the menu with only the forms that the engine holds at about their size, with the bytes of its export.

        Raises:
            RefoldError: A part keeps no form.
        """
        parts = tuple(self._restrict_part(part) for part in menu.parts)
        outer = tuple(self._restrict_matrix(matrix, is_outer=True) for matrix in menu.outer)
        ties = menu.ties if self._holds(("tie",), {"fold": {"groups": [{"layers": [0, 1], "tie": ["mlp"]}]}}) else ()
        identity = identity_blueprint(self._arch)
        header = (self.exported_bytes(identity) or 0) - count_weight_bytes(identity, STORED_BYTES)
        fixed = menu.fixed._replace(bytes=menu.fixed.bytes + max(0, header))
        return menu.model_copy(update={"parts": parts, "outer": outer, "ties": ties, "fixed": fixed})

    def holds(self, blueprint: Blueprint) -> bool:
        """Says whether a target of the engine holds a blueprint at about its size."""
        found = self.exported_bytes(blueprint)
        return found is not None and found <= MOST_LARGER * count_weight_bytes(blueprint, STORED_BYTES)

    def exported_bytes(self, blueprint: Blueprint) -> int | None:
        """Returns the bytes of the smallest export of a blueprint that repeats nothing; None: there is none."""
        found = []
        for target in self._targets:
            if target.judge(blueprint).status == "kept":
                options = ExportOptions(dtype=DTYPES[STORED_BYTES], keeps_integers=target.has_stored_formats)
                found.append(target.count_bytes(blueprint, options))
        return min(found, default=None)

    def _restrict_part(self, part: PartMenu) -> PartMenu:
        forms = [form for form in part.forms if self._holds_form(part, form)]
        if not forms:
            raise RefoldError(
                f"--for {self.engine}: an engine that runs this source is required (it holds no form of layer "
                f"{part.layer}); choose another, or leave --for out"
            )
        kept = tuple(
            form.model_copy(update={"matrices": tuple(self._restrict_matrix(each) for each in form.matrices)})
            for form in forms
        )
        return part.model_copy(update={"forms": kept})

    def _holds_form(self, part: PartMenu, form: PartForm) -> bool:
        if form.kind == "whole":
            return True
        recipe: dict[str, Any] = {}
        find_kind(form.kind).write(recipe, self._arch, {part.layer: form}, part.pool)
        # One form of a kind stands for all of its sizes; the layer counts, because patterns of layers differ.
        return self._holds((form.kind, part.pool, part.layer, *_names(form.setting)), recipe)

    def _restrict_matrix(self, matrix: MenuMatrix, is_outer: bool = False) -> MenuMatrix:
        kept = []
        for form in matrix.forms:
            larger = self._larger(matrix.name, form, is_outer)
            if larger is not None and larger <= MOST_LARGER:
                costs = form.costs._replace(bytes=form.costs.bytes * max(1.0, larger))
                kept.append(form.model_copy(update={"costs": costs}))
        return matrix.model_copy(update={"forms": tuple(kept or matrix.forms[:1])})

    def _larger(self, name: str, form: MatrixForm, is_outer: bool) -> float | None:
        """Returns the exported bytes of a matrix form over the stored ones; None: the engine does not hold it."""
        recipe: dict[str, Any] = {}
        if is_outer:
            if form.scheme is None:
                return 1.0
            keep = {"embeddings": "float", "mixer": "float", "mlp": "float"}
            keep |= {} if self._arch.tied_head else {"head": "float"}
            keep["embeddings" if name == "embedding" else "head"] = form.scheme
            return self._judged(("outer", name, form.scheme), {"quantise": {"to": form.scheme, "keep": keep}})
        if form.rank is not None:
            recipe["factor"] = {"ranks": {name: [8] * self._arch.num_layers}}
        if form.scheme is not None:
            outer = {"embeddings": "float"} if self._arch.tied_head else {"embeddings": "float", "head": "float"}
            recipe["quantise"] = {"to": form.scheme, "keep": outer}
        return self._judged(("matrix", form.rank is None, form.scheme), recipe)

    def _holds(self, key: object, recipe: Mapping[str, Any]) -> bool:
        return self._judged(key, recipe) is not None

    def _judged(self, key: object, recipe: Mapping[str, Any]) -> float | None:
        if key not in self._known:
            self._known[key] = 1.0 if not recipe else self._judge({"dtype": DTYPES[STORED_BYTES], **recipe})
        return self._known[key]

    def _judge(self, recipe: Mapping[str, Any]) -> float | None:
        """Returns the exported bytes over the stored ones of the integers of a recipe, or of all its weights."""
        try:
            blueprint = build_blueprint(self._arch, load_recipe(dict(recipe))).blueprint
        except RecipeError:
            return None
        exported, stored = self.exported_bytes(blueprint), count_weight_bytes(blueprint, STORED_BYTES)
        if exported is None:
            return None
        whole = without_schemes(blueprint)
        exported_whole = self.exported_bytes(whole)
        if blueprint == whole or exported_whole is None:
            return exported / stored if exported <= MOST_LARGER * stored else None
        floats = STORED_BYTES * sum(
            each.num_elements for each in float_tensors(blueprint) if each.scheme_name(blueprint) is not None
        )
        others_exported, others = exported_whole - floats, count_weight_bytes(whole, STORED_BYTES) - floats
        return (exported - others_exported) / (stored - others)


def _names(setting: Mapping[str, Any]) -> tuple[object, ...]:
    """Returns the settings that are names, not sizes."""
    return tuple(value for value in setting.values() if isinstance(value, str))
