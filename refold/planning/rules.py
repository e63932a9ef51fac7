"""Rules across the sections of a recipe: for each the condition that breaks it, and the error message."""

from collections.abc import Callable
from dataclasses import dataclass

from refold.errors import RecipeError
from refold.families.arch import ArchSpec
from refold.recipe.recipe import RankEnergy, RankShare, ResolvedRecipe


@dataclass(frozen=True)
class Rule:
    """One condition that two or more sections of a recipe must meet together.

    Attributes:
        breaks: Says whether a recipe breaks the rule on an architecture.
        message: Returns the error message for a recipe that breaks it.
    """

    breaks: Callable[[ResolvedRecipe, ArchSpec], bool]
    message: Callable[[ResolvedRecipe, ArchSpec], str]


def require_rules(recipe: ResolvedRecipe, arch: ArchSpec) -> None:
    """Checks a recipe against all rules, in the order of the table.

    Raises:
        RecipeError: The recipe breaks a rule.
    """
    for rule in RULES:
        if rule.breaks(recipe, arch):
            raise RecipeError(rule.message(recipe, arch))


def _fold_init(recipe: ResolvedRecipe) -> str:
    """Returns the name in `fold.init`; empty without a fold or with a list of layers."""
    init = None if recipe.fold is None else recipe.fold.init
    return init if isinstance(init, str) else ""


def _lora_init(recipe: ResolvedRecipe) -> str:
    """Returns `relax.init` if it is `svd` or `joint`; empty without LoRAs and for `zero`."""
    init = None if recipe.lora is None else recipe.lora.init
    return "" if init in (None, "zero") else init


def _averages(recipe: ResolvedRecipe) -> bool:
    """Says whether tied layers are averaged; true without a fold, where nothing is tied."""
    return recipe.fold is None or recipe.fold.init == "average"


def _share(recipe: ResolvedRecipe) -> RankShare | None:
    """Returns `relax.rank` if it is a parameter budget."""
    rank = None if recipe.lora is None else recipe.lora.rank
    return rank if isinstance(rank, RankShare) else None


def _energy(recipe: ResolvedRecipe) -> RankEnergy | None:
    """Returns `relax.rank` if it is a share of energy."""
    rank = None if recipe.lora is None else recipe.lora.rank
    return rank if isinstance(rank, RankEnergy) else None


def _measures_lora_ranks(recipe: ResolvedRecipe) -> bool:
    share = _share(recipe)
    return _energy(recipe) is not None or (share is not None and share.split == "measured")


def _shares_budget(recipe: ResolvedRecipe) -> bool:
    """Says whether one measured budget is divided among factors and LoRAs."""
    share, factor = _share(recipe), recipe.factor
    return share is not None and factor is not None and factor.split == share.split == "measured"


def _error_metrics(recipe: ResolvedRecipe, with_width: bool = False) -> list[str]:
    sections = (recipe.factor, recipe.lora, recipe.width if with_width else None)
    return sorted({each.weight for each in sections if each is not None and each.weight is not None})


def _fitted_by(recipe: ResolvedRecipe) -> str:
    """Returns the key of the recipe that fits weights to the tied layers; empty if nothing is fitted."""
    if recipe.lora is not None and recipe.lora.init != "zero":
        return f"relax.init {recipe.lora.init}"
    if recipe.factor is not None:
        return "factor"
    return "" if recipe.weight == "none" else f"weight {recipe.weight}"


def _sequence_length(recipe: ResolvedRecipe, arch: ArchSpec) -> int:
    return min(recipe.calibration.context, arch.max_position_embeddings)


def _averaging_key(recipe: ResolvedRecipe) -> tuple[str, str] | None:
    """Returns the first of `fold.align` and `fold.scale` that is set, with its value; None if neither is."""
    if recipe.fold is None:
        return None
    keys = (("align", recipe.fold.align), ("scale", recipe.fold.scale))
    return next(((key, value) for key, value in keys if value != "none"), None)


def _averaging(recipe: ResolvedRecipe) -> tuple[str, str]:
    found = _averaging_key(recipe)
    assert found is not None
    return found


RULES: tuple[Rule, ...] = (
    Rule(
        lambda recipe, arch: recipe.replaces and recipe.weights == "fresh",
        lambda recipe, arch: "drop: replace must be none where weights are fresh (got linear); remove it",
    ),
    Rule(
        lambda recipe, arch: recipe.shares_bases and recipe.fold is not None and _fold_init(recipe) not in _MEANS,
        lambda recipe, arch: (
            f"fold.init: must be average where factor.share is basis, which makes bases from all tied layers (got "
            f"{recipe.fold and recipe.fold.init}); remove fold.init"
        ),
    ),
    Rule(
        lambda recipe, arch: recipe.fits_in_sequence and not recipe.needs_text,
        lambda recipe, arch: (
            f"calibration.order: sequential requires linears weighted by activations or fisher (got "
            f"{'fresh weights' if recipe.weights == 'fresh' else 'weight: none'}); set relax.weight or factor.weight, "
            f"or remove calibration.order"
        ),
    ),
    Rule(
        lambda recipe, arch: recipe.fits_in_sequence and recipe.shares_bases,
        lambda recipe, arch: (
            "calibration.order: must be at_once where factor.share is basis (got sequential); remove one of them"
        ),
    ),
    Rule(
        lambda recipe, arch: _averaging_key(recipe) is not None and recipe.weights == "fresh",
        lambda recipe, arch: (
            f"fold.{_averaging(recipe)[0]}: must be none where weights are fresh (got {_averaging(recipe)[1]}); remove "
            f"it"
        ),
    ),
    Rule(
        lambda recipe, arch: _averaging_key(recipe) is not None and not _averages(recipe),
        lambda recipe, arch: (
            f"fold.{_averaging(recipe)[0]}: {_averaging(recipe)[1]} requires fold.init average (got "
            f"{recipe.fold and recipe.fold.init}), because it acts on layers that are averaged; set fold.init to "
            f"average, or remove fold.{_averaging(recipe)[0]}"
        ),
    ),
    Rule(
        lambda recipe, arch: recipe.fold is not None and recipe.fold.scale == "norm" and bool(_fitted_by(recipe)),
        lambda recipe, arch: (
            f"fold.scale: must be none where weights are fitted (got norm with {_fitted_by(recipe)}, whose fit decides "
            f"the scale); remove fold.scale, or set relax.init to zero"
        ),
    ),
    Rule(
        lambda recipe, arch: bool(_lora_init(recipe)) and recipe.weights == "fresh",
        lambda recipe, arch: (
            f"relax.init: must be zero where weights are fresh (got {_lora_init(recipe)}); remove relax.init"
        ),
    ),
    Rule(
        lambda recipe, arch: bool(_lora_init(recipe)) and _fold_init(recipe) == "random",
        lambda recipe, arch: (
            f"relax.init: must be zero where fold.init is random (got {_lora_init(recipe)}); remove relax.init"
        ),
    ),
    Rule(
        lambda recipe, arch: _lora_init(recipe) == "joint" and not _averages(recipe),
        lambda recipe, arch: (
            f"fold.init: must be average where relax.init is joint, which makes stored weights from all tied layers "
            f"(got {recipe.fold and recipe.fold.init}); remove fold.init, or set relax.init to svd or zero"
        ),
    ),
    Rule(
        lambda recipe, arch: recipe.fits_in_sequence and recipe.calibration.tokens < 2 * _sequence_length(recipe, arch),
        lambda recipe, arch: (
            f"calibration.tokens: sequential requires two sequences of {_sequence_length(recipe, arch)} tokens, one to "
            f"check the other (got {recipe.calibration.tokens} tokens); raise it, or lower calibration.context"
        ),
    ),
    Rule(
        lambda recipe, arch: len(_error_metrics(recipe)) > 1,
        lambda recipe, arch: (
            f"factor.weight: must equal relax.weight (got {' and '.join(_error_metrics(recipe))}); remove one of them"
        ),
    ),
    Rule(
        lambda recipe, arch: len(_error_metrics(recipe, with_width=True)) > 1,
        lambda recipe, arch: (
            f"width.weight: must equal factor.weight and relax.weight (got "
            f"{' and '.join(_error_metrics(recipe, with_width=True))}); remove one of them"
        ),
    ),
    Rule(
        lambda recipe, arch: recipe.width is not None and recipe.fits_in_sequence,
        lambda recipe, arch: (
            "calibration.order: must be at_once beside width, whose kept neurons and heads are fitted to their inputs "
            "in the source (got sequential); remove one of them"
        ),
    ),
    Rule(
        lambda recipe, arch: (
            recipe.width is not None and recipe.width.split == "measured" and recipe.weights == "fresh"
        ),
        lambda recipe, arch: "width.split: must be even where weights are fresh (got measured); remove it",
    ),
    Rule(
        lambda recipe, arch: _measures_lora_ranks(recipe) and recipe.lora is not None and recipe.lora.at == "all",
        lambda recipe, arch: (
            "relax.at: must be tied where relax.rank is measured by the tying error (got all); remove relax.at, or "
            "give ranks"
        ),
    ),
    Rule(
        lambda recipe, arch: (
            recipe.weights == "fresh"
            and _measures_lora_ranks(recipe)
            and getattr(_share(recipe), "parameters", None) is None
        ),
        lambda recipe, arch: (
            "relax.rank: a number or a share of parameters is required where weights are fresh (nothing is measured)"
        ),
    ),
    Rule(
        lambda recipe, arch: _energy(recipe) is not None and recipe.factor is not None,
        lambda recipe, arch: (
            "relax.rank.energy: cannot stand beside factor, whose budget holds LoRAs too; split measured"
        ),
    ),
    Rule(
        lambda recipe, arch: _shares_budget(recipe) and recipe.shares_bases,
        lambda recipe, arch: (
            "relax.rank.split: must be even where factor.share is basis (got measured); give a rank, or remove relax"
        ),
    ),
    Rule(
        lambda recipe, arch: (
            (share := _share(recipe)) is not None and share.parameters is None and not _shares_budget(recipe)
        ),
        lambda recipe, arch: (
            "relax.rank.parameters: a share is required (got none); give one, or split both relax.rank and factor as "
            "measured"
        ),
    ),
    Rule(
        lambda recipe, arch: (
            (share := _share(recipe)) is not None
            and share.parameters is not None
            and share.split == "measured"
            and recipe.factor is not None
        ),
        lambda recipe, arch: (
            f"relax.rank.parameters: must be removed beside factor (got {getattr(_share(recipe), 'parameters', 0):g}), "
            f"whose budget holds LoRAs too; and factor.split must be measured"
        ),
    ),
    Rule(
        lambda recipe, arch: (
            _shares_budget(recipe)
            and recipe.lora is not None
            and recipe.lora.init == "zero"
            and recipe.weights == "source"
        ),
        lambda recipe, arch: "relax.init: must be joint or svd where relax.rank is measured beside factor (got zero)",
    ),
)
_MEANS = ("average", "random")
