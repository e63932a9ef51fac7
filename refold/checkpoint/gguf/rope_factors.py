"""The `llama3` rope scaling, found again from the factors that a GGUF file stores instead of it."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

_TOLERANCE = 1e-4
"""Largest relative error of a factor; the file has factors of 32 bits, computed from wavelengths of 32 bits."""
_LOW, _HIGH = 1.0, 4.0
"""Bounds of all published models, tried first."""


def find_llama3_scaling(factors: Sequence[float], theta: float) -> dict[str, Any] | None:
    """Finds the numbers of the `llama3` scaling whose factors are given.

    A wavelength w is multiplied by 1 if it is short, by `factor` f if it is long, and between by 1 / ((1 - s) / f + s)
    with s = (c / w - low) / (high - low), where c is the original context. Only ratios of c, low and high matter.

    Args:
        factors: The factor of each rotated pair.
        theta: Base of the rope.

    Returns:
        `rope_type` and the numbers, as in `rope_parameters`; an empty dict if no wavelength is scaled; None if these
        are not factors of such a scaling.
    """
    if not all(math.isfinite(each) and each >= 1 - _TOLERANCE for each in factors):
        return None
    factor = max(factors)
    if factor <= 1 + _TOLERANCE:
        return {}
    wavelengths = [2 * math.pi * theta ** (index / len(factors)) for index in range(len(factors))]
    whole = float(round(factor)) if abs(factor - round(factor)) < _TOLERANCE * factor else factor
    for context, low, high in _fit(factors, wavelengths, factor):
        found = [_factor(wave, whole, context, low, high) for wave in wavelengths]
        if all(abs(one - other) <= _TOLERANCE * other for one, other in zip(found, factors, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": whole,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    return None


def _factor(wavelength: float, factor: float, context: int, low: float, high: float) -> float:
    if wavelength < context / high:
        return 1.0
    if wavelength > context / low:
        return factor
    smooth = (context / wavelength - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)


def _fit(factors: Sequence[float], wavelengths: Sequence[float], factor: float) -> Iterator[tuple[int, float, float]]:
    """Yields contexts with their two bounds that may have given the factors."""
    between = [
        (wave, (1 / each - 1 / factor) / (1 - 1 / factor))
        for wave, each in zip(wavelengths, factors, strict=True)
        if 1 + _TOLERANCE < each < factor * (1 - _TOLERANCE)
    ]
    if not between:
        long = min(wave for wave, each in zip(wavelengths, factors, strict=True) if each > 1 + _TOLERANCE)
        short = max((wave for wave in wavelengths if wave < long), default=long / 16)
        yield max(1, round((_HIGH * short * _LOW * long) ** 0.5)), _LOW, _HIGH
        return
    wave, smooth = between[0]
    yield max(1, round(wave * (_LOW + (_HIGH - _LOW) * smooth))), _LOW, _HIGH
    if len(between) > 1:
        last_wave, last_smooth = between[-1]
        # s = slope / w - low is the formula for high - low = 1.
        slope = (smooth - last_smooth) / (1 / wave - 1 / last_wave)
        low = slope / last_wave - last_smooth
        if slope > 0 and low > 0:
            yield max(1, round(slope / low)), 1.0, float(f"{(low + 1) / low:.4g}")
