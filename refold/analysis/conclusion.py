"""Conclusions from measurements: rankings of layers, and advice on drops, tying and settings to try next."""

import statistics

from refold.sources.measurements import Influence, Measurements, Similarity, TyingSpectra

NUM_NAMED = 3
"""Layers, or pairs of layers, that a ranking names."""
IDLE_SHARE = 1 / 3
"""Share of the median influence below which a layer is idle."""
ALIKE = 0.7
"""Relative distance of weights below which two layers are similar; unrelated matrices of equal norm are at 1."""
MOST_LOST = 0.35
"""Share of the weights' energy that tying may lose; above it low rank is the better choice."""


def least_important(influence: Influence, count: int = NUM_NAMED) -> dict[str, tuple[int, ...]]:
    """Returns the layers with the least influence, for blocks, attention and MLPs, least first."""
    return {
        name: tuple(sorted(range(len(values)), key=lambda layer: values[layer])[:count])
        for name, values in (("block", influence.block), ("attention", influence.attention), ("MLP", influence.mlp))
    }


def most_alike(similarity: Similarity, count: int = NUM_NAMED) -> list[tuple[float, int, int]]:
    """Returns the most similar pairs of layers, with the distance of their weights, mean over linears."""
    return similarity.pairs()[:count]


def conclude(found: Measurements) -> list[str]:
    """Returns advice, one sentence for each measure with a conclusion."""
    return [_about_drops(found), *_about_twins(found), *_about_tying(found)]


def _about_drops(found: Measurements) -> str:
    block = found.influence.block
    idle = [layer for layer, value in enumerate(block) if value < IDLE_SHARE * statistics.median(block)]
    if not idle:
        return "No layer is idle: each changes the stream by a third of the median or more, so expect any drop to cost."
    named = ", ".join(map(str, sorted(idle, key=lambda layer: block[layer])))
    return (
        f"Layers {named} change the stream by less than a third of the median: drop them first "
        f"(--set 'drop.block={{count: {len(idle)}, by: similarity}}' with these measurements)."
    )


def _about_twins(found: Measurements) -> list[str]:
    alike = [(one, other) for distance, one, other in found.similarity.pairs() if distance < ALIKE]
    if not alike:
        return ["No two layers have like weights: tying has to be relaxed by LoRAs, or replaced by low rank."]
    named = "; ".join(f"{one} and {other}" for one, other in alike[:3])
    return [f"Layers with like weights, the first to be tied: {named}."]


def _about_tying(found: Measurements) -> list[str]:
    if not found.spectra:
        return []
    best = min(found.spectra, key=mean_lost)
    lost, way = mean_lost(best), f"{best.pattern} with {best.loops} loops"
    if lost > MOST_LOST:
        return [
            f"Even the best tying measured ({way}) loses {lost:.0%} of the weights' energy: try the recipes `lowrank` "
            f"and `compact` first."
        ]
    settings = f"--set fold.loops={best.loops} --set fold.pattern={best.pattern}"
    return [f"Tying by {way} loses {lost:.0%} of the weights' energy, the least measured: try `joint` with {settings}."]


def mean_lost(spectra: TyingSpectra) -> float:
    """Returns the share of energy that one tying loses, mean over linears."""
    return statistics.fmean(each.lost for each in spectra.linears.values())
