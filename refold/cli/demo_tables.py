"""The table, samples and summary line of the demo."""

from typing import Any

from refold.cli.show import format_bytes, print_table
from refold.evaluation.result import Evaluation
from refold.studies.demo import PROMPT, DemoResult, DemoRow


def print_demo(found: DemoResult) -> None:
    """Prints the table, the samples and the summary line."""
    source = found.rows[0]
    # Every plan has the cost of the source.
    planned = next(row.plan for row in found.rows if row.plan is not None)
    source_cache = planned.cost.source.cache_bytes(found.context)
    print()
    print_table(
        ("model", "bytes", "of source", f"cache at {found.context:,}", "bits/byte", "healed", "agreement", "healed"),
        [_cells(row, source, source_cache, found.context) for row in found.rows],
    )
    print(
        "\nbits/byte: held-out modules of the standard library, lower is better; agreement: same likeliest token as the"
    )
    print("source. In parentheses: built-in recipes. Tying saves weights, not cache or FLOPs. Full rank with own norms")
    print("gives the source back.")
    for name, text in found.samples.items():
        print(f"\n--- {name} ---\n{PROMPT}{text}")
    print(f"\n{found.line}")


def demo_data(found: DemoResult) -> dict[str, Any]:
    """Returns the result as plain data for JSON."""
    return {
        "rows": [
            {
                "name": row.name,
                "folder": str(row.folder),
                "before": row.before.model_dump(mode="json"),
                "after": None if row.after is None else row.after.model_dump(mode="json"),
            }
            for row in found.rows
        ],
        "samples": found.samples,
        "line": found.line,
    }


def _cells(row: DemoRow, source: DemoRow, source_cache: int, context: int) -> tuple[str, ...]:
    cache = source_cache if row.plan is None else row.plan.cost.target.cache_bytes(context)
    return (
        row.name,
        format_bytes(row.weight_bytes),
        f"{row.weight_bytes / source.weight_bytes:.0%}",
        format_bytes(cache),
        f"{row.before.bits_per_byte:.3f}",
        "" if row.after is None else f"{row.after.bits_per_byte:.3f}",
        _agreement(row.before),
        "" if row.after is None else _agreement(row.after),
    )


def _agreement(found: Evaluation) -> str:
    return "" if found.against is None else f"{found.against.agreement:.1%}"
