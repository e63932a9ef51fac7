"""The recipe: all settings for folding and healing a source. Every section is optional; an empty recipe is identity."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from refold.blueprint.origins import ErrorMetric
from refold.fields import Amount, Count, LayerIndex, Real, Section
from refold.mixers.placement import AnyEntry
from refold.recipe.drop import Drop, LayerList
from refold.recipe.fold import Fold, list_or_name
from refold.recipe.heal import HealStage, read_heal
from refold.recipe.low_rank import Factor, Split
from refold.recipe.quantise import Quantise
from refold.recipe.share_kv import ShareKv
from refold.recipe.vocabulary import VocabularyTrim
from refold.recipe.width import Width
from refold.suggest import must_be_one_of


def _kind_of_rank(value: Any) -> str:
    if isinstance(value, RankShare) or (isinstance(value, dict) and value.keys() & {"parameters", "split"}):
        return "<share>"
    if isinstance(value, RankEnergy) or (isinstance(value, dict) and "energy" in value):
        return "<energy>"
    return "<linears>" if isinstance(value, dict) else _kind_of_one_rank(value)


def _kind_of_one_rank(value: Any) -> str:
    return "<full>" if isinstance(value, str) else "<number>"


def _known_relax(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type", "lora") not in RELAXATIONS:
        raise ValueError(f"type: {must_be_one_of(value['type'], RELAXATIONS)}")
    return value


def _kind_of_relax(value: Any) -> str:
    return f"<{value.get('type', 'lora') if isinstance(value, dict) else getattr(value, 'type', 'lora')}>"


def _kind_of_shrinkage(value: Any) -> str:
    return "<name>" if isinstance(value, str) else "<number>"


RELAXATIONS = ("lora", "prefix")
RankChoice = Annotated[int, Field(strict=True, ge=0)]
OneRank = Annotated[
    Annotated[RankChoice, Tag("<number>")] | Annotated[Literal["full"], Tag("<full>")], Discriminator(_kind_of_one_rank)
]


class RankShare(Section):
    """A parameter budget for all LoRAs together."""

    parameters: Annotated[Real, Field(gt=0)] | None = None
    """Budget as a share of the source's non-embedding parameters, such as 0.15. It may be omitted only beside `factor`,
    whose budget then includes the LoRAs."""
    split: Split = "even"
    """Division of the budget. `even`: the largest uniform rank that fits. `measured`: the ranks by linear and depth
    that lower the error most."""


class RankEnergy(Section):
    """Ranks that restore a share of the tying error, computed from the source's weights."""

    energy: Annotated[Real, Field(gt=0, le=1)]
    """Least share of each residual's energy, in the error metric `relax.weight`, that its LoRA restores."""


class LoraRelax(Section):
    """Relaxes tied linears by a LoRA for each depth: `y = W x + B (A x)`."""

    type: Literal["lora"] = "lora"
    rank: Annotated[
        Annotated[RankChoice, Tag("<number>")]
        | Annotated[Literal["full"], Tag("<full>")]
        | Annotated[RankShare, Tag("<share>")]
        | Annotated[RankEnergy, Tag("<energy>")]
        | Annotated[dict[str, OneRank], Field(min_length=1), Tag("<linears>")],
        Discriminator(_kind_of_rank),
    ]
    """Rank of the LoRAs. A number: one rank for all linears. `full`: the full rank. `{parameters: 0.15}`: a budget as a
    share of the source's non-embedding parameters, split evenly or by measurement. `{energy: 0.6}`: the least ranks
    that restore this share of each residual. A mapping of linears (`q_proj`) and groups (`mixer`, `mlp`, `all`) to
    ranks: the more specific name wins, and other linears get no LoRA. Ranks are capped at the smaller side of each
    linear; 0: no LoRA."""
    at: Literal["tied", "all"] = "tied"
    """Linears that get LoRAs: those that several depths use (`tied`), or all, so that only adapters can be trained."""
    multiple: Count = 1
    """Ranks above this number are rounded down to a multiple of it, except full ranks. Formats with blocks of 32 inputs
    want multiples of 32."""
    init: Literal["svd", "zero", "joint"] | None = None
    """Initialisation of LoRAs. `svd`: the truncated SVD of the tying error. `zero`: no effect. `joint`: fitted together
    with the stored weights. Default: `zero` if the stored layers are initialised `stepwise` or fresh, else `svd`."""
    vectors: Literal["tied", "own"] = "tied"
    """Norms, q/k norms and biases: tied like the linears, as in the paper, or stored for each depth (`own`)."""
    gain: Literal["tied", "own"] = "tied"
    """`own`: each depth scales the output of its mixer and of its MLP by one number each, 1 at first."""
    weight: ErrorMetric | None = None
    """Error metric of `svd` and `joint`: `none`, the weights, as in the paper; `activations`, the outputs on
    calibration text; `fisher`, the effect on the loss there. Default: as `factor.weight` or `width.weight`, and
    `activations` beside `factor` or `width`, else `none`."""
    svd: Literal["auto", "exact"] = "auto"
    """`auto` chooses the fastest method that is accurate enough; `exact` forces LAPACK's full decomposition."""


class Calibration(Section):
    """The amount of calibration text for measurements and fits, and the order in which linears are fitted to it."""

    tokens: Amount = 65_536
    """Number of tokens, drawn from the whole text."""
    context: Count = 512
    """Tokens of each sequence; at most the source's context."""
    order: Literal["at_once", "sequential"] = "at_once"
    """`at_once`: each linear is fitted to its inputs in the source. `sequential`: linears are fitted from the first
    depth to the last, each to its inputs in the model folded so far, with the outputs in the source as the target, as
    GPTQ quantises (arXiv 2210.17323). Linears that would be copied are fitted too."""
    shrink: Annotated[
        Annotated[Literal["none", "auto"], Tag("<name>")]
        | Annotated[Annotated[Real, Field(ge=0, le=1)], Tag("<number>")],
        Discriminator(_kind_of_shrinkage),
    ] = "none"
    """Strength s by which fits shrink towards fits without text, which helps on kinds of text that the calibration text
    lacks: the second moments C of inputs and gradients become (1 - s) C + s tr(C)/n I. `none`: 0. `auto`: chosen for
    each linear by cross-checking: fits to one half of the text, or to all kinds but one, are measured on the rest."""


class PrefixRelax(Section):
    """Relaxes tied attention by prefix vectors for each depth. The depth computes keys and values of the prefix, and
    every token attends to them (RRT, arXiv 2410.20672, appendix H)."""

    type: Literal["prefix"] = "prefix"
    length: Count
    """Number of prefix vectors (of the hidden size) of each depth."""
    at: Literal["tied", "all"] = "tied"
    """Depths that get a prefix: those whose attention is tied, or all with attention."""
    vectors: Literal["tied", "own"] = "tied"
    """As for `lora`."""
    gain: Literal["tied", "own"] = "tied"
    """As for `lora`."""


Relax = Annotated[
    Annotated[LoraRelax, Tag("<lora>")] | Annotated[PrefixRelax, Tag("<prefix>")],
    Discriminator(_kind_of_relax),
    BeforeValidator(_known_relax),
]


class ExitPlacement(Section):
    """Places early exits in the stack."""

    at: Annotated[
        Annotated[Literal["loops"], Tag("<name>")] | Annotated[LayerList, Tag("<list>")],
        Discriminator(list_or_name),
    ] = "loops"
    """Places of exits: after each loop (`loops`), or after the listed depths (counted from 0). The last depth cannot be
    listed, because it ends in the final norm and the head."""
    norm: Literal["shared", "own"] = "shared"
    """Norm of the exits: the final norm (`shared`), or one norm for each exit, initialised as a copy of the final norm
    (`own`)."""
    head_rank: RankChoice = 0
    """Rank of a LoRA on the shared head for each exit, without effect at first; 0: no LoRA."""
    gate: bool = False
    """Whether each exit has a gate: a small linear that predicts if the exit and the full depth agree on the token."""


class IgnoredTensor(Section):
    """Source tensors that are ignored on purpose."""

    name: str
    """Name, or a pattern with `*`."""
    reason: Annotated[str, Field(min_length=1)]
    """Reason, which is written into the plan."""


class Recipe(Section):
    """All settings for folding and healing a source."""

    description: str = ""
    """One line for `refold recipes`."""
    weights: Literal["source", "fresh"] = "source"
    """`fresh`: the same architecture with new weights, the from-scratch control."""
    seed: LayerIndex = 0
    """Seed of all fresh weights."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Dtype of all stored floats. Default: the source's."""
    fold: Fold | None = None
    """Ties layers: a block that runs several times, or listed groups."""
    relax: Relax | None = None
    """Relaxes the tie by LoRAs or prefixes for each depth."""
    factor: Factor | None = None
    """Stores linears as two factors of lower rank."""
    calibration: Calibration = Calibration()
    """The amount of calibration text, and the order in which linears are fitted to it."""
    drop: Drop | None = None
    """Drops layers, token mixers or MLPs."""
    width: Width | None = None
    """Drops neurons of MLPs and key-value heads inside of layers."""
    mixers: tuple[AnyEntry, ...] = ()
    """Replaces the attention of some depths by mixers of linear cost."""
    share_kv: ShareKv | None = None
    """Lets depths read keys and values of an earlier depth instead of computing and caching their own: a rule, such as
    `{from: first_loop}`, or a list, such as `[{depth: 3, from: 1}]`."""
    exits: ExitPlacement | None = None
    """Places early exits in the stack."""
    ignore_tensors: tuple[IgnoredTensor, ...] = ()
    """Source tensors that are ignored on purpose, each with the reason."""
    quantise: Quantise | None = None
    """Stores weights as integers."""
    vocabulary: VocabularyTrim | None = None
    """Drops tokens that a text never uses, with their rows of embedding and head."""
    heal: Annotated[tuple[HealStage, ...], BeforeValidator(read_heal)] = ()
    """Training stages after conversion, in order; or a protocol, such as `{protocol: distil, tokens: 20M}`."""

    @property
    def lora(self) -> LoraRelax | None:
        """The options of LoRAs; None if the recipe has no LoRAs."""
        return self.relax if isinstance(self.relax, LoraRelax) else None

    @property
    def shares_bases(self) -> bool:
        """Whether tied linears are kept as a basis for all and coefficients for each depth."""
        return self.factor is not None and self.factor.share == "basis"

    @property
    def owns_vectors(self) -> bool:
        """Whether depths of tied parts have their own norms, q/k norms and biases."""
        return self.shares_bases if self.relax is None else self.relax.vectors == "own"

    @property
    def relaxes_all(self) -> bool:
        """Whether untied depths are relaxed too."""
        return self.relax is not None and self.relax.at == "all"

    @property
    def owns_gains(self) -> bool:
        """Whether relaxed depths have gains."""
        return self.relax is not None and self.relax.gain == "own"

    @property
    def weight(self) -> ErrorMetric:
        """The error metric of fitted linears."""
        given: list[ErrorMetric] = [each.weight for each in self._fits if each is not None and each.weight is not None]
        is_weighted = self.factor is not None or self.width is not None
        return given[0] if given else ("activations" if is_weighted else "none")

    @property
    def _fits(self) -> tuple[Factor | LoraRelax | Width | None, ...]:
        return self.factor, self.lora, self.width

    @property
    def measures_widths(self) -> bool:
        """Whether the widths of parts are measured on the source."""
        return self.weights == "source" and self.width is not None and self.width.split == "measured"

    @property
    def measures_ranks(self) -> bool:
        """Whether ranks are measured on the source's weights."""
        rank = None if self.lora is None else self.lora.rank
        chosen = isinstance(rank, RankEnergy) or (isinstance(rank, RankShare) and rank.split == "measured")
        return self.weights == "source" and (chosen or (self.factor is not None and self.factor.split == "measured"))

    @property
    def needs_text(self) -> bool:
        """Whether linears are fitted to calibration text."""
        return self.weights == "source" and self.weight != "none"

    @property
    def replaces(self) -> bool:
        """Whether linear maps, solved on calibration text, stand in for dropped parts."""
        return self.drop is not None and self.drop.replaces

    @property
    def counts_tokens(self) -> bool:
        """Whether the kept tokens are counted in calibration text."""
        return self.vocabulary is not None and self.vocabulary.counts_text

    @property
    def quantises(self) -> bool:
        """Whether a conversion rounds weights; with healing stages they are rounded after the last one."""
        return self.quantise is not None and not self.heal

    @property
    def rounds_by_text(self) -> bool:
        """Whether a conversion rounds weights with error feedback, if there is text."""
        return self.quantises and self.quantise is not None and self.quantise.rounding != "plain"

    @property
    def fits_in_sequence(self) -> bool:
        """Whether linears are fitted in sequence, each to its inputs in the model folded so far."""
        return self.calibration.order == "sequential"

    @property
    def shrinkage(self) -> float | None:
        """The strength by which moments shrink; None: it is chosen by cross-checking."""
        given = self.calibration.shrink
        if isinstance(given, str):
            return None if given == "auto" else 0.0
        return float(given)

    @property
    def measures_influence(self) -> bool:
        """Whether a measurement, if there is one, decides which parts are dropped."""
        return self.drop is not None and bool(self.drop.by_influence)

    @property
    def needs_influence(self) -> bool:
        """Whether a measurement is required to decide which parts are dropped."""
        return self.drop is not None and "similarity" in self.drop.by_influence

    def resolved(self) -> "ResolvedRecipe":
        """Fills in the defaults that depend on other fields: `fold.init` and `relax.init`."""
        fold, relax = self.fold, self.lora
        if relax is not None and relax.init is None:
            fresh = self.weights == "fresh" or (fold is not None and fold.init in ("stepwise", "random"))
            fresh = fresh or relax.rank == 0
            relax = relax.model_copy(update={"init": "zero" if fresh else "svd"})
        if fold is not None and fold.init is None:
            averaged = (relax is not None and relax.init != "zero") or self.shares_bases
            fold = fold.model_copy(update={"init": "average" if averaged else "stepwise"})
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return ResolvedRecipe.model_construct(
            self.model_fields_set, **{**fields, "fold": fold, "relax": relax or self.relax}
        )


class ResolvedRecipe(Recipe):
    """A recipe with all defaults filled in, as planning requires it."""

    @model_validator(mode="after")
    def _has_inits(self) -> "ResolvedRecipe":
        if self.fold is not None and self.fold.init is None:
            raise ValueError("fold.init: required in a resolved recipe (got none)")
        if self.lora is not None and self.lora.init is None:
            raise ValueError("relax.init: required in a resolved recipe (got none)")
        return self

    def resolved(self) -> "ResolvedRecipe":
        """Returns the recipe itself."""
        return self
