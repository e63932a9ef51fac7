"""The table of `refold calibrate`."""

from refold.cli.show import print_table
from refold.engine.thresholds import Thresholds


def print_thresholds(found: Thresholds) -> None:
    """Prints the thresholds of all exits, with their effect."""
    rows = [
        [
            str(each.depths),
            "never" if each.threshold is None else f"{each.threshold:.5f}",
            f"{each.leaves:.1%}",
            f"{each.differs:.3%}",
            "-" if each.bound is None else f"{each.bound:.3%}",
        ]
        for each in found.exits
    ]
    columns = ("exit after", f"{found.measure} from", "tokens that leave", "that differ", "bound")
    print_table(columns, rows)
    print(
        f"\n{found.differs:.3%} of the tokens differ from the full depth's, at most {found.tolerance:.3g} with "
        f"confidence {found.confidence:.3g}; kv {found.kv}"
    )
    if found.live is not None:
        print(
            f"in generation {found.live.leaves:.1%} of {found.live.tokens:,} tokens leave and {found.live.differs:.3%} "
            f"differ ({found.live.documents} prompts)"
        )
    print(f"{found.documents:,} documents, {found.tokens:,} tokens, the first {found.context} tokens of each at most")
