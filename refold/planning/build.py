"""The construction of a blueprint from an architecture and a recipe, with all checks across the two."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from refold.blueprint.cost import ParameterCount, count_parameters
from refold.blueprint.origins import Initialisation
from refold.blueprint.owned.registry import owned_kinds
from refold.blueprint.quantisation import describe_schemes, with_schemes
from refold.blueprint.schema import (
    POOLS,
    Blueprint,
    DepthSpec,
    Exit,
    MixerPart,
    MlpPart,
    Pool,
    idle_names,
    part_linears,
    part_vectors,
)
from refold.errors import RecipeError
from refold.families.arch import ArchSpec
from refold.mixers.spec import MLP
from refold.planning.drops import describe_dropped, dropped_blocks, dropped_parts
from refold.planning.factors import factorise_evenly, factorise_listed, linear_budget, with_multiples
from refold.planning.fold import UNTIED, FoldedStack, describe_alignment, fold_layers, listed_ties, tied_sources
from refold.planning.key_sharing import Reads, choose_reads, describe_reads
from refold.planning.mixers import ChosenMixer, choose_mixers, describe_lost_norms
from refold.planning.notes import Note, Notes, advise, describe_reach, notes
from refold.planning.relax import LinearShapes, choose_ranks, with_prefixes
from refold.planning.replacements import choose_replacements, describe_replacements
from refold.planning.rules import require_rules
from refold.planning.schemes import choose_schemes
from refold.planning.widths import Widths, choose_widths, describe_widths, with_widths
from refold.recipe.fold import Fold
from refold.recipe.recipe import ExitPlacement, RankEnergy, Recipe
from refold.sources.measurements import Influence

UNMEASURED_WIDTHS = "width.split: widths are measured during conversion; this plan assumes even widths"
UNCOUNTED_TOKENS = "vocabulary: tokens are chosen during conversion"
UNMEASURED_RANKS = "ranks are measured during conversion; this plan assumes"


class Built(NamedTuple):
    """The result of a recipe on an architecture."""

    blueprint: Blueprint
    starts: Initialisation
    notes: Notes


@dataclass(frozen=True)
class _StoredPool:
    """The stored parts of one pool.

    Attributes:
        sources: For each part the source layers that it is computed from.
        users: For each part the source layers whose depths use it.
    """

    sources: tuple[tuple[int, ...], ...]
    users: tuple[tuple[int, ...], ...]

    def part_of(self, layer: int) -> int | None:
        return next((part for part, users in enumerate(self.users) if layer in users), None)

    def ties(self, layer: int) -> bool:
        part = self.part_of(layer)
        return part is not None and len(self.users[part]) > 1


def identity_blueprint(arch: ArchSpec) -> Blueprint:
    """Returns the source as a blueprint, in which every part is used once."""
    layers = range(arch.num_layers)
    return Blueprint(
        arch=arch,
        mixers=tuple(MixerPart(sources=(layer,)) for layer in layers),
        mlps=tuple(MlpPart(sources=(layer,)) for layer in layers),
        depths=tuple(
            DepthSpec(source=index, mixer=index, mlp=index, window=layer.window, rope=layer.rope)
            for index, layer in enumerate(arch.layers)
        ),
    )


def build_blueprint(
    arch: ArchSpec, recipe: Recipe, influence: Influence | None = None, widths: Widths | None = None
) -> Built:
    """Builds the blueprint of a recipe.

    The steps: drop whole layers; divide the rest into prelude, tied block and coda; drop attention and MLPs; choose
    mixers and shared keys and values; narrow parts; choose ranks; place exits. The stack has one depth for each source
    layer, in their order; a dropped layer is a depth without mixer and MLP.

    Args:
        arch: The source.
        recipe: The recipe; defaults that depend on other fields are filled in here.
        influence: Measured influence of the source's layers; None: not measured.
        widths: Measured widths; None: those of the recipe, shares evenly.

    Raises:
        RecipeError: The recipe does not fit the architecture.
    """
    recipe = recipe.resolved()
    require_rules(recipe, arch)
    identity = identity_blueprint(arch)
    counted = count_parameters(identity)
    blocks = _dropped_blocks(arch, recipe, counted, influence)
    layers = tuple(layer for layer in range(arch.num_layers) if layer not in blocks)
    stack = fold_layers(recipe.fold, layers) if recipe.fold and recipe.fold.loops else UNTIED
    layers = tuple(layer for layer in layers if layer not in stack.dropped)
    sizes: dict[Pool, int] = {pool: _part_parameters(identity, pool) for pool in POOLS}
    dropped: Mapping[Pool, frozenset[int]] = dict.fromkeys(POOLS, frozenset())
    if recipe.drop is not None:
        dropped = dropped_parts(recipe.drop, layers, arch.num_layers, sizes, counted.final_norm, influence)
    using = {pool: tuple(layer for layer in layers if layer not in dropped[pool]) for pool in POOLS}
    undecided = recipe.drop is not None and bool(recipe.drop.by_influence) and influence is None
    stacks: dict[Pool, FoldedStack] = {
        pool: _ties(recipe.fold, pool, stack, using[pool], arch.num_layers, not undecided) for pool in POOLS
    }
    chosen = choose_mixers(recipe, arch)
    pools: dict[Pool, _StoredPool] = {
        "mixer": _store("mixer", arch, recipe, stacks["mixer"], using["mixer"], lambda layer: chosen[layer].signature),
        "mlp": _store("mlp", arch, recipe, stacks["mlp"], using["mlp"], lambda layer: chosen[layer].has_fresh_mlp),
    }
    stored = [chosen[users[0]] for users in pools["mixer"].users]
    attending = [mixer if pools["mixer"].part_of(layer) is not None else None for layer, mixer in enumerate(chosen)]
    reads = {} if recipe.share_kv is None else choose_reads(recipe.share_kv, arch, attending, stack)
    blueprint = Blueprint(
        arch=arch,
        mixers=tuple(
            MixerPart(sources=sources, mixer=each.mixer)
            for sources, each in zip(pools["mixer"].sources, stored, strict=True)
        ),
        mlps=tuple(
            MlpPart(sources=() if chosen[users[0]].has_fresh_mlp else sources)
            for sources, users in zip(pools["mlp"].sources, pools["mlp"].users, strict=True)
        ),
        depths=tuple(_depth(recipe, layer, pools, chosen[layer], reads) for layer in range(arch.num_layers)),
    )
    if recipe.width is not None:
        blueprint = with_widths(blueprint, choose_widths(recipe.width, arch) if widths is None else widths)
    ranks, rank_notes = _ranks(recipe, blueprint, pools, chosen, counted.non_embedding)
    blueprint = with_prefixes(_with_ranks(blueprint, ranks), recipe.relax)
    if recipe.exits is not None:
        blueprint = _with_exits(blueprint, recipe.exits, recipe.fold, stack)
    relaxed, lora, kinds = any(depth.ranks for depth in blueprint.depths), recipe.lora, owned_kinds(blueprint)
    said = (
        *notes(
            describe_dropped(recipe.drop, influence, blocks, dropped) if recipe.drop else (),
            "pending" if undecided else "fact",
        ),
        *notes(stack.notes),
        *notes(describe_reach(blueprint)),
        *notes(describe_lost_norms(arch, chosen)),
        *notes(describe_reads(reads, arch.num_key_value_heads) if reads else ()),
        *notes(describe_widths(blueprint), "pending" if recipe.measures_widths and widths is None else "fact"),
        *notes([UNMEASURED_WIDTHS] if recipe.measures_widths and widths is None else (), "pending"),
        *notes(rank_notes, "ranks"),
        *notes(note for kind in kinds if kind.place == "stack" for note in kind.notes(blueprint)),
        *notes(describe_alignment(blueprint, recipe.fold.align) if recipe.fold else ()),
        *notes(note for kind in kinds if kind.place == "exits" for note in kind.notes(blueprint)),
    )
    if recipe.fits_in_sequence:
        order = "calibration.order: linears are fitted from the first depth to the last, also those otherwise copied"
        said = (*said, Note(text=order))
    if recipe.factor is not None and recipe.factor.parameters is None:
        blueprint, line = factorise_listed(blueprint, recipe.factor)
        said = (*said, Note(text=line))
    elif recipe.factor is not None:
        assert recipe.factor.parameters is not None
        blueprint, line = factorise_evenly(blueprint, identity, recipe.factor)
        budget = linear_budget(identity, recipe.factor.parameters)
        measured = f"{UNMEASURED_RANKS} even ranks; linears and LoRAs will have {budget:,} parameters"
        said = (*said, Note(kind="pending", text=measured) if recipe.measures_ranks else Note(text=line))
    elif recipe.measures_ranks:
        line = f"{UNMEASURED_RANKS} {'the largest' if isinstance(lora and lora.rank, RankEnergy) else 'even'} ranks"
        said = (*said, Note(kind="pending", text=line))
    blueprint = with_multiples(blueprint, recipe)
    if recipe.quantise is not None and recipe.quantises:
        blueprint = with_schemes(blueprint, choose_schemes(blueprint, recipe.quantise))
        said = (*said, Note(text=f"quantise: {describe_schemes(blueprint)}"))
    elif recipe.quantise is not None:
        said = (*said, Note(text="quantise: after healing; convert writes floats"))
    replacements = ()
    if recipe.drop is not None and recipe.replaces and not undecided:
        replacements = choose_replacements(recipe.drop, blueprint, blocks, dropped)
        said = (*said, *notes(describe_replacements(replacements)))
    if recipe.vocabulary is not None:
        line = f"{UNCOUNTED_TOKENS} ({recipe.vocabulary.describe()}); this plan assumes all {arch.vocab_size:,}"
        said = (*said, Note(kind="pending", text=line))
    starts = Initialisation(
        weights=recipe.weights,
        lora=lora.init if relaxed and lora else None,
        svd=lora.svd if lora else "auto",
        weight=recipe.weight if recipe.weights == "source" else "none",
        align=recipe.fold.align if recipe.fold else "none",
        scale=recipe.fold.scale if recipe.fold else "none",
        transfers=tuple(mixer.transfers for mixer in stored) if recipe.mixers else (),
        replacements=replacements,
        seed=recipe.seed,
    )
    return Built(blueprint, starts, (*said, *notes(advise(recipe, relaxed))))


def _dropped_blocks(
    arch: ArchSpec, recipe: Recipe, counted: ParameterCount, influence: Influence | None
) -> frozenset[int]:
    if recipe.drop is None or recipe.drop.block is None:
        return frozenset()
    return dropped_blocks(recipe.drop.block, arch.num_layers, counted.layer, counted.final_norm, influence)


def _part_parameters(identity: Blueprint, pool: Pool) -> int:
    linears, vectors = part_linears(identity, pool, 0), part_vectors(identity, pool, 0)
    return sum(math.prod(shape) for shape in (*linears.values(), *vectors.values()))


def _ties(
    fold: Fold | None, pool: Pool, block: FoldedStack, using: Sequence[int], num_layers: int, is_final: bool
) -> FoldedStack:
    """Returns the ties of one pool."""
    if fold is None or fold.groups is None:
        return block if fold is not None and pool in fold.tie else UNTIED
    return listed_ties(fold, pool, using, num_layers, is_final)


def _store(
    pool: Pool,
    arch: ArchSpec,
    recipe: Recipe,
    stack: FoldedStack,
    using: Sequence[int],
    signature: Callable[[int], Hashable],
) -> _StoredPool:
    """Assigns layers to stored parts. Tied layers with different signatures get one part for each signature."""
    parts: dict[Hashable, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    places = dict(zip(stack.block, stack.stored, strict=True))
    # Parts are stored in the order of their first use.
    for layer in using:
        stored, kind = places.get(layer), signature(layer)
        if stored is None:
            parts["layer", layer] = ((layer,), (layer,))
        elif ("block", stored, kind) not in parts:
            assert recipe.fold is not None
            alike = tuple(each for each in using if signature(each) == kind)
            sources = tied_sources(recipe.fold, stack, alike, arch.num_layers)
            parts["block", stored, kind] = (sources[stored], stack.groups(alike)[stored])
    fresh = recipe.weights == "fresh"
    return _StoredPool(
        sources=tuple(() if fresh else made for made, _ in parts.values()),
        users=tuple(users for _, users in parts.values()),
    )


def _ranks(
    recipe: Recipe,
    blueprint: Blueprint,
    pools: dict[Pool, _StoredPool],
    chosen: Sequence[ChosenMixer],
    non_embedding: int,
) -> tuple[list[dict[str, int]], tuple[str, ...]]:
    relax = recipe.lora
    if relax is None:
        return [{} for _ in chosen], ()

    def linears(pool: Pool, layer: int) -> LinearShapes:
        arch = blueprint.part_arch(pool, pools[pool].part_of(layer))
        if pool == "mlp":
            return MLP.linears(arch)
        idle = idle_names(blueprint, layer)
        found = chosen[layer].mixer.linears(arch)
        return {name: shape for name, shape in found.items() if name not in idle}

    every = range(blueprint.arch.num_layers)

    def relaxes(pool: Pool, layer: int) -> bool:
        return pools[pool].ties(layer) or (relax.at == "all" and pools[pool].part_of(layer) is not None)

    tied: list[dict[Pool, LinearShapes]] = [
        {pool: linears(pool, layer) for pool in POOLS if relaxes(pool, layer)} for layer in every
    ]
    if not any(tied):
        raise RecipeError(
            "relax: tied layers are required (no part is used twice); set fold.loops to 2 or more, or relax.at to all"
        )
    known: dict[Pool, LinearShapes] = {
        pool: {name: shape for layer in every for name, shape in linears(pool, layer).items()} for pool in POOLS
    }
    return choose_ranks(relax, tied, known, non_embedding)


def _depth(recipe: Recipe, layer: int, pools: dict[Pool, _StoredPool], mixer: ChosenMixer, reads: Reads) -> DepthSpec:
    tied = any(pools[pool].ties(layer) for pool in POOLS)
    own = tied and recipe.owns_vectors
    return DepthSpec(
        source=layer,
        mixer=pools["mixer"].part_of(layer),
        mlp=pools["mlp"].part_of(layer),
        vectors="own" if own else "tied",
        gain="own" if recipe.owns_gains and (tied or recipe.relaxes_all) else "tied",
        window=mixer.window,
        rope=mixer.rope,
        kv=reads.get(layer, ()),
    )


def _with_ranks(blueprint: Blueprint, ranks: Sequence[dict[str, int]]) -> Blueprint:
    depths = zip(blueprint.depths, ranks, strict=True)
    return blueprint.model_copy(update={"depths": tuple(d.model_copy(update={"ranks": own}) for d, own in depths)})


def _with_exits(blueprint: Blueprint, exits: ExitPlacement, fold: Fold | None, stack: FoldedStack) -> Blueprint:
    last = blueprint.num_depths - 1
    if exits.at == "loops":
        if fold is None or fold.loops in (None, 1) or fold.pattern == "sequence":
            raise RecipeError(
                "exits.at: loops needs a block that runs as a whole two or more times (fold.loops above 1 and pattern "
                "cycle or cycle_reversed); list the depths instead"
            )
        places = tuple(end for end in stack.loop_ends() if end != last)
    else:
        for depth in exits.at:
            if depth >= last:
                raise RecipeError(
                    f"exits.at: depth {depth} is out of range (an exit is before the last of {last + 1} depths: "
                    f"0..{last - 1})"
                )
        places = exits.at
    rank = min(exits.head_rank, blueprint.arch.hidden_size, blueprint.arch.vocab_size)
    each = Exit(norm=exits.norm, head_rank=rank, gate=exits.gate)
    depths = tuple(
        depth.model_copy(update={"exit": each}) if index in places else depth
        for index, depth in enumerate(blueprint.depths)
    )
    return blueprint.model_copy(update={"depths": depths})
