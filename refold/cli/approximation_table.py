"""How well feature maps approximate attention, as a table."""

from collections.abc import Mapping

from refold.cli.show import print_table
from refold.planning.approximation import Approximation


def print_approximation(found: Mapping[str, Approximation]) -> None:
    """One line for each depth; nothing where there is no such depth."""
    if not found:
        return
    first = next(iter(found.values()))
    on = "held-out text" if first.inputs == "text" else "random inputs"
    rows = [
        (
            name.removeprefix("depths."),
            f"{each.start:.3f}",
            _number(each.fitted),
            f"{each.start_gap:.3f}",
            _number(each.fitted_gap),
        )
        for name, each in found.items()
    ]
    print()
    print_table(
        ("depth", "attention misplaced", "fitted", "cross-entropy gap (nats)", "fitted"),
        rows,
        f"softmax attention by feature maps, at conversion, on {first.tokens:,} tokens of {on}",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
