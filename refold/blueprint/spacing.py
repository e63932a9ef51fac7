"""Evenly spaced picks: the rule behind stepwise tying and even dropping."""


def evenly_spaced(num_layers: int, num_kept: int) -> tuple[int, ...]:
    """Picks `round(linspace(0, L-1, P))`, half to even: first and last are always kept.

    The arithmetic is NumPy's own (one float step, the last point exact), so that the picks are those of
    `numpy.round(numpy.linspace(0, L - 1, P))` for every L and P.

    Args:
        num_layers: L.
        num_kept: P, from 0 to L.
    """
    if num_kept < 2:
        return (0,)[:num_kept]
    step = (num_layers - 1) / (num_kept - 1)
    return (*(round(index * step) for index in range(num_kept - 1)), num_layers - 1)
