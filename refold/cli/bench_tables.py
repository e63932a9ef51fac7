"""Tables of a bench."""

from refold.cli.show import format_bytes, print_table
from refold.studies.bench_result import Bench, BenchRow, Latency


def print_bench(found: Bench) -> None:
    """Prints a table for each scenario."""
    for scenario in dict.fromkeys(row.scenario for row in found.rows):
        rows = [row for row in found.rows if row.scenario == scenario]
        prices = list(rows[0].tokens_per_price)
        columns = ["contender", "tokens/s", "ratio", "first token, ms", "between tokens, ms", "memory", "depths"]
        columns += ["accepted"] * any(row.accepted is not None for row in rows)
        columns += [f"tokens for 1 of money, {name}" for name in prices]
        print_table(columns, [_cells(row, columns, prices) for row in rows], scenario)
        print()
    print("medians over rounds, tokens/s with quartiles; waiting times: median / 99th percentile over requests")


def _cells(row: BenchRow, columns: list[str], prices: list[str]) -> list[str]:
    speed = row.tokens_per_second
    cells = [
        row.contender,
        f"{speed.median:.1f} ({speed.low:.1f} to {speed.high:.1f})",
        f"{row.ratio.median:.2f}",
        _milliseconds(row.first_token),
        _milliseconds(row.between_tokens),
        "-" if row.memory is None else format_bytes(row.memory),
        "-" if row.depths is None else f"{row.depths:.0%}",
    ]
    if "accepted" in columns:
        cells.append("-" if row.accepted is None else f"{row.accepted:.0%}")
    return cells + [f"{row.tokens_per_price[name]:,.0f}" for name in prices]


def _milliseconds(found: Latency) -> str:
    return f"{found.median * 1e3:.1f} / {found.p99 * 1e3:.1f}"
