"""Residual spectra: the energy that tying a source's layers loses, and the share that LoRAs of each rank keep."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from refold.calibration.similarity import linears_of
from refold.calibration.weighting import Weighting
from refold.families.arch import ArchSpec
from refold.planning.fold import fold_layers
from refold.recipe.fold import Fold
from refold.sources.measurements import LinearSpectrum, TyingSpectra
from refold.sources.pieces import PieceReader

SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the full rank for which kept energy is computed."""


def tyings(num_layers: int) -> list[tuple[Literal["cycle", "sequence"], int]]:
    """Returns the tyings that are measured: pattern and loops."""
    return [(pattern, loops) for loops in (2, 3) if loops <= num_layers for pattern in ("cycle", "sequence")]


def tie_spectra(
    pieces: PieceReader,
    arch: ArchSpec,
    pattern: Literal["cycle", "sequence"],
    loops: int,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> TyingSpectra:
    """Measures one tying, which replaces each layer by the mean of its group.

    The weights of one linear of one group are in memory at a time. Layers left over by `loops` stay untied at the
    beginning, as with `fold.uneven: prelude`.

    Args:
        pieces: Reads the source.
        arch: The source's architecture.
        pattern: As `fold.pattern`.
        loops: As `fold.loops`.
        device: Where matrices are decomposed.
        progress: Called with the number of linears that are done.
    """
    fold = Fold(loops=loops, pattern=pattern, init="average", uneven="prelude")
    groups = fold_layers(fold, range(arch.num_layers)).groups(range(arch.num_layers))
    linears = {}
    for done, (name, canonical) in enumerate(linears_of(arch).items(), start=1):
        linears[name] = _spectrum(pieces, canonical, groups, device)
        progress(done)
    return TyingSpectra(pattern=pattern, loops=loops, groups=groups, shares=SHARES, linears=linears)


def _spectrum(pieces: PieceReader, canonical: str, groups: Sequence[Sequence[int]], device: str) -> LinearSpectrum:
    plain, whole, residual, kept = Weighting(), 0.0, 0.0, [0.0] * len(SHARES)
    for group in groups:
        weights = [pieces.read(canonical, layer, torch.float32).to(device) for layer in group]
        mean = sum(weights) / len(weights)
        whole += sum(plain.energy(each) for each in weights)
        # The residuals of two layers are opposite, so one decomposition serves both.
        for each in weights[:1] if len(group) == 2 else weights:
            spectrum = plain.spectrum(each - mean) * (2 if len(group) == 2 else 1)
            residual += float(spectrum.sum())
            for index, share in enumerate(SHARES):
                kept[index] += float(spectrum[: max(1, round(share * len(spectrum)))].sum())
    return LinearSpectrum(
        lost=residual / whole if whole else 0.0, kept=tuple(each / residual if residual else 1.0 for each in kept)
    )
