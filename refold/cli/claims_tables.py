"""The tables of `refold claims`."""

from collections.abc import Mapping, Sequence

from refold.claims.record import ClaimsRecord
from refold.cli.show import print_json, print_table, print_text


def print_list(rows: Sequence[Mapping[str, str]], as_json: bool) -> None:
    """Prints the claims, and which of them a scale runs."""
    if as_json:
        print_json(list(rows))
        return
    print_table(
        ("claim", "this scale", "statement"),
        [(row["name"], "not run" if row["not_run"] else "run", f"{row['paper']}: {row['statement']}") for row in rows],
    )


def print_claims(found: ClaimsRecord) -> None:
    """Prints verdicts and comparisons."""
    rows = []
    for claim in found.claims:
        rows.append((claim.name, claim.verdict, claim.why, "", ""))
        rows += [
            (
                "",
                each.outcome,
                f"{each.comparison}{f', {each.domain}' if each.domain else ''}",
                f"{each.effect:+.4f} ({each.low:+.4f} to {each.high:+.4f})",
                f"{each.detectable:.4f}",
            )
            for each in claim.findings
        ]
    print_table(("claim", "verdict", "comparison", "effect (95% interval)", "detectable"), rows)
    print_text(
        "An effect is above zero if the order stated by the paper holds. Detectable: the true effect that would be "
        "found with probability 0.8."
    )
