"""Strengths by which second moments shrink, chosen by cross-checking folds of the calibration text."""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refold.blueprint.integers import Scheme
from refold.calibration.calibration import CalibrationText
from refold.calibration.curves import LinearSources
from refold.calibration.feedback import round_with_feedback
from refold.calibration.moments import MomentStore, Shrinkage
from refold.calibration.weighting import INPUT_RIDGE, OUTPUT_RIDGE, Moments, Weighting, ridged, shrunk
from refold.errors import DataError
from refold.nn.rounding import Rounded
from refold.sources.pieces import PieceReader

STRENGTHS = (0.0, 0.03, 0.1, 0.3, 1.0)
"""Strengths that are cross-checked."""
MOST_FOLDS = 4
"""Most folds of a text; kinds of text beyond share folds with earlier ones."""
PROBE_ROWS = 64
"""Outputs of a linear whose rounding is cross-checked; outputs are rounded independently of each other."""
PROBE_SHARE = 4
"""Rank of the fit that is cross-checked where no rank is planned: the full rank divided by this number."""

Fit = Callable[[Moments], Float[Tensor, "out in"]]
"""Fits a linear under moments, and returns the change of its weight."""


def cross_check(fit: Fit, pairs: Sequence[tuple[Moments, Moments]], strengths: Sequence[float]) -> tuple[float, ...]:
    """Returns the error of fits under shrunk moments, measured on moments of other text, for each strength.

    Args:
        fit: The fit; it adds its own ridge.
        pairs: Moments of the text that is fitted to, and of the text that the fit is measured on.
        strengths: The strengths to compare.

    Returns:
        For each strength the sum of errors over all pairs, in the unit of `Moments.error`.
    """
    return tuple(sum(other.error(fit(given.shrink(strength))) for given, other in pairs) for strength in strengths)


def fit_low_rank(weight: Float[Tensor, "out in"], rank: int) -> Fit:
    """Returns the fit of a weight by two factors of a rank."""

    def fit(moments: Moments) -> Tensor:
        outputs = None if moments.outputs is None else ridged(moments.outputs, OUTPUT_RIDGE)
        found = Weighting(ridged(moments.inputs, INPUT_RIDGE), outputs).truncate(weight, rank, "auto", 0)
        return found.matrix() - weight

    return fit


def number_folds(text: CalibrationText) -> Int[Tensor, " B"]:
    """Returns the fold of each held-out sequence, from 0: its kind of text, or with a single kind one of two halves.

    Raises:
        DataError: There is one sequence alone, so that nothing can be cross-checked.
    """
    rows, length = text.held_out.input_ids.shape
    if rows < 2:
        raise DataError(
            f"calibration.shrink: at least two sequences of {length} tokens are required for auto (got {rows}); raise "
            f"calibration.tokens or lower calibration.context"
        )
    known = {kind: place % MOST_FOLDS for place, kind in enumerate(dict.fromkeys(text.kinds))}
    if len(known) < 2:
        return torch.arange(rows) % 2
    return torch.tensor([known[kind] for kind in text.kinds])


def leave_one_out(store: MomentStore, layer: int, linear: str) -> Iterator[tuple[Moments, Moments]]:
    """Yields for each fold the moments of all other folds, and those of the fold itself."""
    tokens = store.tokens
    for fold in range(len(tokens)):
        others = [0 if each == fold else count for each, count in enumerate(tokens)]
        alone = [int(each == fold) for each in range(len(tokens))]
        yield store.read_folds(layer, linear, others), store.read_folds(layer, linear, alone)


def choose_shrinkage(
    groups: Sequence[tuple[LinearSources, int | None]],
    pieces: PieceReader,
    store: MomentStore,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> Shrinkage:
    """Chooses the strength of each source layer.

    Args:
        groups: The stored linears, each with its planned rank, None without one.
        pieces: Reader of the source.
        store: Moments by folds.
        device: Device that computes.
        progress: Called with the number of linears that are done.
    """
    errors: dict[tuple[int, str], tuple[float, ...]] = {}
    for done, (group, planned) in enumerate(groups, start=1):
        rank = planned or max(1, min(group.shape) // PROBE_SHARE)
        for layer in dict.fromkeys(group.users.values()):
            read = pieces.read(group.carried.canonical, layer, torch.float32, group.carried.repeat)
            fit = fit_low_rank(read.to(device), rank)
            pairs = [(one.to(device), other.to(device)) for one, other in leave_one_out(store, layer, group.linear)]
            errors[layer, group.linear] = cross_check(fit, pairs, STRENGTHS)
        progress(done)
    return Shrinkage(strengths={key: STRENGTHS[each.index(min(each))] for key, each in errors.items()})


def round_shrunk(
    weight: Float[Tensor, "out in"], moments: Float[Tensor, "*F in in"], scheme: Scheme, strength: float | None
) -> Rounded:
    """Rounds a weight with error feedback under shrunk moments.

    Args:
        weight: The weight.
        moments: Sums of x x^T over tokens, for each fold of the text where a strength is to be chosen.
        scheme: Bits, groups and zero point.
        strength: Strength of the shrinkage; None: the best of `STRENGTHS` on the folds left out, for some outputs.
    """
    whole = moments if moments.ndim == 2 else moments.sum(dim=0)
    if strength is None:
        rows = weight[torch.arange(0, len(weight), -(-len(weight) // PROBE_ROWS))].float()
        pairs = [(Moments(whole - each), Moments(each)) for each in moments]
        errors = cross_check(
            lambda given: round_with_feedback(rows, given.inputs, scheme).dequantise() - rows, pairs, STRENGTHS
        )
        strength = STRENGTHS[errors.index(min(errors))]
    return round_with_feedback(weight, shrunk(whole, strength), scheme)
