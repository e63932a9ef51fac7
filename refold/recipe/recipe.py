"""The recipe: what is done to a source, in one file for the whole way. Every section is optional; empty: identity."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from refold.blueprint.initialisation import Align, ErrorMetric
from refold.fields import Amount, Count, LayerIndex, Real, Section, refuse_repeats
from refold.mixers.placement import AnyEntry
from refold.recipe.drop import Drop, LayerList
from refold.recipe.heal import HealStage, read_heal
from refold.recipe.share_kv import ShareKv
from refold.recipe.tying import TYING_INITS
from refold.suggest import did_you_mean, must_be_one_of, shorten


def _known_init(name: str) -> str:
    if name not in TYING_INITS:
        raise ValueError(
            f"must be one of {', '.join(TYING_INITS)} or a list of source layers (got {shorten(name)})"
            f"{did_you_mean(name, TYING_INITS)}"
        )
    return name


# Tags between angle brackets name the branch of a union; messages leave them out.
def _list_or_name(value: Any) -> str:
    return "<list>" if isinstance(value, (list, tuple)) else "<name>"


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


RELAXATIONS = ("lora", "prefix")
ListedInit = Annotated[tuple[LayerIndex, ...], Field(min_length=1)]
FoldInit = Annotated[
    Annotated[str, AfterValidator(_known_init), Tag("<name>")] | Annotated[ListedInit, Tag("<list>")],
    Discriminator(_list_or_name),
]
RankChoice = Annotated[int, Field(strict=True, ge=0)]
OneRank = Annotated[
    Annotated[RankChoice, Tag("<number>")] | Annotated[Literal["full"], Tag("<full>")], Discriminator(_kind_of_one_rank)
]


class Fold(Section):
    """Which layers are tied into a block that runs several times, and how the stored layers start."""

    loops: Count
    """How often the block runs."""
    pattern: Literal["cycle", "sequence", "cycle_reversed"] = "cycle"
    """Order in which the K stored layers run: 1..K again and again (`cycle`); each one `loops` times in a row
    (`sequence`); or forwards in even and backwards in odd loops, counted from 0 (`cycle_reversed`)."""
    init: FoldInit | None = None
    """How stored layers start: `stepwise`, `average`, `lower`, `upper`, `random`, or a list with one source layer for
    each stored layer of the block. Left out: `average` where LoRAs start from `svd` or `joint`, else `stepwise`."""
    tie: Annotated[tuple[Literal["mixer", "mlp"], ...], Field(min_length=1), AfterValidator(refuse_repeats)] = (
        "mixer",
        "mlp",
    )
    """What is tied. What is not keeps one part for each layer."""
    align: Align = "none"
    """How layers are brought into a common frame before they are tied, so that like is tied to like: neurons of MLPs
    and heads in another order (`permutation`), values of each head in other axes (`rotation`), or `both`. None of it
    changes what a layer computes. Needs `init: average`."""
    scale: Literal["none", "norm"] = "none"
    """`norm`: the mean of tied linears is scaled to the mean of their Frobenius norms, which the mean of unlike
    matrices falls short of. Only where nothing is fitted: needs `init: average`, and LoRAs from zero or none."""
    prelude: LayerIndex = 0
    """Number of untied layers kept before the block."""
    coda: LayerIndex = 0
    """Number of untied layers kept after the block."""
    uneven: Literal["error", "drop", "prelude"] = "error"
    """What to do where `loops` does not divide the layers of the block: refuse (`error`), leave out the surplus, evenly
    spaced (`drop`), or add the surplus to the prelude (`prelude`)."""


Split = Literal["even", "measured"]


class RankShare(Section):
    """A budget for all LoRAs together."""

    parameters: Annotated[Real, Field(gt=0)] | None = None
    """Share of the source's non-embedding parameters, such as 0.15. Left out only beside `factor`, whose budget then
    holds the LoRAs too."""
    split: Split = "even"
    """`even`: the largest uniform rank that fits; `measured`: each linear and depth gets what lowers the error most."""


class RankEnergy(Section):
    """Ranks that keep a share of what tying lost, measured by the source's weights."""

    energy: Annotated[Real, Field(gt=0, le=1)]
    """Share of each residual's energy, in the weighting of `relax.weight`, that its LoRA keeps at least."""


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
    """One rank for all linears; `full`; `{parameters: 0.15}`, a budget as a share of the source's non-embedding
    parameters, split evenly or as measured; `{energy: 0.6}`, what keeps that share of each residual; or a mapping of
    linears (`q_proj`) and groups (`mixer`, `mlp`, `all`) to ranks, where the more specific
    name wins and what is not named gets none. Capped at the smaller side of each linear; 0 is no LoRA."""
    at: Literal["tied", "all"] = "tied"
    """Which linears: those of parts that several depths use, or all, so that adapters alone can be trained."""
    init: Literal["svd", "zero", "joint"] | None = None
    """How LoRAs start: from the truncated SVD of what tying lost (`svd`), without effect (`zero`), or fitted together
    with the stored weights (`joint`). Left out: `zero` for stored layers that start `stepwise` or fresh, else `svd`."""
    vectors: Literal["tied", "own"] = "tied"
    """Whether norms, q/k norms and biases are tied with the linears, as in the paper, or kept for each depth."""
    gain: Literal["tied", "own"] = "tied"
    """`own`: each depth scales what its mixer and its MLP add to the residual stream by one number each, 1 at first."""
    weight: ErrorMetric | None = None
    """What `svd` and `joint` weigh their errors by: nothing, as in the paper; what linears see on calibration text
    (`activations`); or what their errors do to the loss there (`fisher`). Left out: as `factor`, else `none`."""
    svd: Literal["auto", "exact"] = "auto"
    """`auto` takes the fastest method that is accurate enough; `exact` forces LAPACK's full decomposition."""


class Factor(Section):
    """Keeps stored linears as two factors of lower rank, as SVD-LLM does (arXiv 2403.07378), under a fold too."""

    parameters: Annotated[Real, Field(gt=0)]
    """Share of the source's linear weights that the target's take, LoRAs included, such as 0.6."""
    share: Literal["none", "basis"] = "none"
    """`basis`: of linears that are tied by `fold` one input-side factor A is stored, and each depth has an output-side
    factor B of its own, `y = B (A x)` (Basis Sharing, arXiv 2410.03765). Norms and biases are then each depth's own
    too, but beside a `relax` go by its `vectors`. Linears that are not tied have two factors as ever."""
    split: Split = "even"
    """`even`: every stored linear keeps the same share; `measured`: each keeps what lowers the error most, its whole
    matrix if that is better. With `relax.rank: {split: measured}` it is also measured for each tied linear whether
    tying pays: where it does not, its depths get factors of their own."""
    weight: ErrorMetric | None = None
    """What errors are weighed by: nothing, what linears see on calibration text, or what errors do to the loss. Left
    out: as `relax`, else `activations`."""


class Calibration(Section):
    """How much calibration text is read, where anything is measured on some, and how linears are fitted to it."""

    tokens: Amount = 65_536
    """Tokens, drawn from all over the text."""
    context: Count = 512
    """Tokens of each sequence; at most the source's context."""
    order: Literal["at_once", "sequential"] = "at_once"
    """`at_once`: each linear is fitted by what it sees in the source. `sequential`: from top to bottom, each by what it
    sees in the model folded so far, aimed at what the source gives, as GPTQ quantises (arXiv 2210.17323); whole linears
    too that nothing else changes."""


class PrefixRelax(Section):
    """Relaxes tied attention by vectors for each depth, of which its own projections make keys and values that every
    token attends to (RRT, arXiv 2410.20672, appendix H)."""

    type: Literal["prefix"] = "prefix"
    length: Count
    """How many vectors of the hidden size each depth has."""
    at: Literal["tied", "all"] = "tied"
    """Which depths: those whose attention is tied, or all with attention."""
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
    """Where the stack may be left early."""

    at: Annotated[
        Annotated[Literal["loops"], Tag("<name>")] | Annotated[LayerList, Tag("<list>")],
        Discriminator(_list_or_name),
    ] = "loops"
    """After each loop, or after the depths listed (counted from 0). The last depth is none: it ends in the final norm
    and the head."""
    norm: Literal["shared", "own"] = "shared"
    """Whether exits use the final norm, or each has its own, which starts as a copy of it."""
    head_rank: RankChoice = 0
    """Rank of a LoRA on the shared head for each exit, without effect at first; 0 is none."""
    gate: bool = False
    """Whether each exit has a small linear that predicts if its likeliest token is that of the full depth."""


class IgnoredTensor(Section):
    """Source tensors that are left out on purpose."""

    name: str
    """Name, or a pattern with `*`."""
    reason: Annotated[str, Field(min_length=1)]
    """Why; it is written into the plan."""


class Recipe(Section):
    """Everything that is done to a source."""

    description: str = ""
    """One line for `refold recipes`."""
    weights: Literal["source", "fresh"] = "source"
    """`fresh`: the same architecture with new weights, the from-scratch control."""
    seed: LayerIndex = 0
    """Seed of every weight that starts fresh."""
    fold: Fold | None = None
    """Ties layers into a loop."""
    relax: Relax | None = None
    """Relaxes the tie with something small for each depth."""
    factor: Factor | None = None
    """Keeps stored linears as two factors of lower rank."""
    calibration: Calibration = Calibration()
    """How much calibration text is read, and how linears are fitted to it."""
    drop: Drop | None = None
    """Leaves out layers, token mixers or MLPs."""
    mixers: tuple[AnyEntry, ...] = ()
    """Replaces the attention of some depths by mixers of linear cost."""
    share_kv: ShareKv | None = None
    """Depths that read keys and values of an earlier depth instead of making and caching their own: a rule, such as
    `{from: first_loop}`, or a list, such as `[{depth: 3, from: 1}]`."""
    exits: ExitPlacement | None = None
    """Places where the stack may be left early."""
    ignore_tensors: tuple[IgnoredTensor, ...] = ()
    """Source tensors that are left out on purpose, each with the reason."""
    heal: Annotated[tuple[HealStage, ...], BeforeValidator(read_heal)] = ()
    """Training stages after conversion, in order; or a protocol, such as `{protocol: distil, tokens: 20M}`."""

    @property
    def lora(self) -> LoraRelax | None:
        """How LoRAs relax tied linears; None where none do."""
        return self.relax if isinstance(self.relax, LoraRelax) else None

    @property
    def shares_bases(self) -> bool:
        """Whether tied linears are kept as a basis for all and coefficients for each depth."""
        return self.factor is not None and self.factor.share == "basis"

    @property
    def owns_vectors(self) -> bool:
        """Whether the depths of tied parts keep norms, q/k norms and biases of their own."""
        return self.shares_bases if self.relax is None else self.relax.vectors == "own"

    @property
    def relaxes_all(self) -> bool:
        """Whether depths are relaxed that tie nothing."""
        return self.relax is not None and self.relax.at == "all"

    @property
    def owns_gains(self) -> bool:
        """Whether relaxed depths scale what their parts add."""
        return self.relax is not None and self.relax.gain == "own"

    @property
    def weight(self) -> ErrorMetric:
        """What the errors of fitted linears are weighed by."""
        given: list[ErrorMetric] = [
            each.weight for each in (self.factor, self.lora) if each is not None and each.weight is not None
        ]
        return given[0] if given else ("activations" if self.factor is not None else "none")

    @property
    def measures_ranks(self) -> bool:
        """Whether ranks follow from the source's weights, and not from the recipe alone."""
        rank = None if self.lora is None else self.lora.rank
        chosen = isinstance(rank, RankEnergy) or (isinstance(rank, RankShare) and rank.split == "measured")
        return self.weights == "source" and (chosen or (self.factor is not None and self.factor.split == "measured"))

    @property
    def needs_text(self) -> bool:
        """Whether linears are fitted to calibration text."""
        return self.weights == "source" and self.weight != "none"

    @property
    def fits_in_sequence(self) -> bool:
        """Whether linears are fitted one after the other, by what they see in the folded model."""
        return self.calibration.order == "sequential"

    @property
    def measures_influence(self) -> bool:
        """Whether what is left out follows from measurement, if there is one."""
        return self.drop is not None and bool(self.drop.by_influence)

    @property
    def needs_influence(self) -> bool:
        """Whether what is left out follows from measurement, so that there has to be one."""
        return self.drop is not None and "similarity" in self.drop.by_influence

    def resolved(self) -> "ResolvedRecipe":
        """Returns the recipe with the defaults filled in that depend on other fields: `fold.init` and `relax.init`."""
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
    """A recipe whose defaults are all filled in: the only kind that planning reads."""

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
