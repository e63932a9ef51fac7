"""The table of `refold calibrate`."""

from refold.cli.show import print_table
from refold.engine.thresholds import Thresholds, ToleranceLevel


def print_thresholds(found: Thresholds) -> None:
    """Prints the thresholds of all exits, with their effect."""
    for level in found.levels:
        if len(found.levels) > 1:
            print(f"tolerance {level.tolerance:g}{' (default)' if level == found.level else ''}")
        _print_level(found, level)
        print()
    print(f"{found.documents:,} documents, {found.tokens:,} tokens, the first {found.context} tokens of each at most")


def _print_level(found: Thresholds, level: ToleranceLevel) -> None:
    rows = [
        [
            str(each.depths),
            "never" if each.threshold is None else f"{each.threshold:.5f}",
            f"{each.leaves:.1%}",
            f"{each.differs:.3%}",
            "-" if each.bound is None else f"{each.bound:.3%}",
        ]
        for each in level.exits
    ]
    columns = ("exit after", f"{found.measure} from", "tokens that leave", "that differ", "bound")
    print_table(columns, rows)
    print(
        f"\n{level.differs:.3%} of the tokens differ from the full depth's, at most {level.tolerance:.3g} with "
        f"confidence {found.confidence:.3g}; kv {found.kv}"
    )
    if level.live is not None:
        print(
            f"in generation {level.live.leaves:.1%} of {level.live.tokens:,} tokens leave and {level.live.differs:.3%} "
            f"differ ({level.live.documents} prompts)"
        )
    else:
        print("not checked in generation")
