"""Lines and tables of a fit: the choice, its costs, the runner-up and single methods at the same budget."""

import math
from pathlib import Path

from refold.cli.show import format_bytes, format_count, print_table, print_text, progress
from refold.errors import RefoldError
from refold.fitting.report import (
    QUANTITY_NAMES,
    CostFigures,
    FitCandidate,
    FitPoint,
    FitReport,
    MeasuredLoss,
    Quantity,
    SingleMethod,
    mean_divergence,
)
from refold.progress import describe_duration

MAX_NAME = 24
"""Columns of a name of a text in a table."""


def print_fit(found: FitReport) -> None:
    """Prints a fit in about ten lines, a sweep as a table of its points, a dry run as its steps."""
    if found.is_forecast:
        _print_forecast(found)
    elif len(found.points) == 1:
        _print_point(found, found.points[0])
    else:
        _print_sweep(found)
    for line in found.notes:
        print_text(line)


def measure_device(path: Path, source: str | None, device: str | None, overwrite: bool) -> None:
    """Measures this machine, and writes and prints its table.

    Raises:
        RefoldError: The file exists, it cannot be written, or there is no such source or device.
    """
    from refold.checkpoint.atomic_file import require_free
    from refold.fitting.device_clock import ClockSettings
    from refold.fitting.device_clock import measure_device as measure
    from refold.fitting.device_table import read_table

    def is_table(existing: Path) -> bool:
        try:
            read_table(existing)
        except RefoldError:
            return False
        return True

    require_free(path, "table of `fit --measure-device`", is_table, overwrite)
    with progress("measuring", "steps") as report:
        found = measure(path, source, ClockSettings(device=device), report)
    print_text(f"table of {found.machine.describe()}: {path}; give --latency 20ms --on {path}")


def format_loss(loss: float | None) -> str:
    """Returns a loss with its sign, as `+0.046`, with more digits near zero; `-` for None."""
    if loss is None:
        return "-"
    return f"{loss:+.4f}" if abs(loss) < 0.01 else f"{loss:+.3f}" if abs(loss) < 1 else f"{loss:+.2f}"


def format_cost(quantity: Quantity, value: float) -> str:
    """Returns a cost with its unit."""
    if quantity == "milliseconds":
        return f"{value:.3g} ms"
    return format_count(value) if quantity == "flops" else format_bytes(value)


def _print_point(found: FitReport, point: FitPoint) -> None:
    print_text(f"budget: {point.budget.text} of {found.source}, counted at two bytes a number")
    print_text(f"chosen: {point.summary or 'everything as it is'}")
    print_text(f"costs: {_costs(point.costs, found)}")
    print_text(f"loss: {_losses(point)}")
    print_text(f"by kind: {'; '.join(_class_lines(found, point)) or 'nothing was changed'}")
    print_text(f"runner-up: {_runner_up(point)}")
    _print_singles(found, point)


def _costs(costs: CostFigures, found: FitReport) -> str:
    shown: list[Quantity] = [name for name in QUANTITY_NAMES if getattr(found.source_costs, name)]
    parts = [
        f"{costs.share(name, found.source_costs):.1%} of the {QUANTITY_NAMES[name]} "
        f"({format_cost(name, getattr(costs, name))})"
        for name in shown
    ]
    return ", ".join(parts) + f"; context {found.context:,}"


def _losses(point: FitPoint) -> str:
    if not point.measured:
        return f"predicted {format_loss(point.predicted)} nats per token; not measured, for lack of held-out text"
    parts = [f"{_with_error(each)} on {_short(name)}" for name, each in point.losses.items()]
    text = f"{', '.join(parts)} nats per token{' after healing' if point.healed else ''}"
    if point.predicted is None:
        return text
    word = "" if point.agrees else ", beyond the stated error"
    measured = format_loss(mean_divergence(point.measured))
    return f"{text}; divergence from the source: predicted {format_loss(point.predicted)}, measured {measured}{word}"


def _with_error(found: MeasuredLoss) -> str:
    return format_loss(found.loss) + (f" ± {found.error:.2g}" if found.error is not None else "")


def _class_lines(found: FitReport, point: FitPoint) -> list[str]:
    lines = []
    for each in point.classes:
        shares: dict[Quantity, float] = {name: each.saved.share(name, found.source_costs) for name in QUANTITY_NAMES}
        saved = [f"{QUANTITY_NAMES[name]} {-share:+.1%}" for name, share in shares.items() if abs(share) >= 0.0005]
        lines.append(f"{each.name} {format_loss(each.loss)} ({', '.join(saved) or 'no cost changed'})")
    return lines


def _runner_up(point: FitPoint) -> str:
    other = point.runner_up
    if other is None:
        return "none"
    return f"{other.summary or other.name}: {format_loss(other.loss)} ({'measured' if other.losses else 'predicted'})"


def _print_singles(found: FitReport, point: FitPoint) -> None:
    """Prints single methods as columns, because there are more of them than held-out texts."""
    columns = ["at this budget", "fit", *(single.name for single in point.singles)]
    made: list[FitCandidate | None] = [point, *(single.made for single in point.singles)]
    texts = [each.name for each in found.held_out] or list(point.losses)
    rows = [[_short(name), *(_cell(each, name) for each in made)] for name in texts]
    quantity = found.limited[0]
    shares = ["none" if each is None else f"{each.costs.share(quantity, found.source_costs):.0%}" for each in made]
    print_table(columns, [[QUANTITY_NAMES[quantity], *shares], *rows])


def _cell(made: FitCandidate | None, text: str) -> str:
    return "" if made is None else format_loss(made.losses[text].loss if text in made.losses else None)


def _print_sweep(found: FitReport) -> None:
    texts = [each.name for each in found.held_out]
    # Budgets of one quantity need its name only once.
    words = {name.partition(" ")[0] for name in found.budget_names}
    limit = f"{words.pop()} limit" if len(words) == 1 else "budget"
    budgets = [name.partition(" ")[2] if limit != "budget" else name for name in found.budget_names]
    limited = [QUANTITY_NAMES[name] for name in found.limited]
    columns = [limit, *limited, "predicted", *map(_short, texts), "best single method", "loss"]
    rows = []
    for point, budget in zip(found.points, budgets, strict=True):
        shares = [f"{point.costs.share(name, found.source_costs):.1%}" for name in found.limited]
        losses = [format_loss(point.losses[name].loss if name in point.losses else None) for name in texts]
        best = best_single(point)
        single = ["none fits", "-"] if best is None or best.made is None else [best.name, format_loss(best.made.loss)]
        rows.append([budget, *shares, format_loss(point.predicted), *losses, *single])
    also = f"; {found.shared_budget}" if found.shared_budget else ""
    print_table(columns, rows, f"{found.source}: nats per token over the source, at two bytes a number{also}")


def best_single(point: FitPoint) -> SingleMethod | None:
    """Returns the single method of least loss at the budget of a point; None if none meets it."""

    def loss(single: SingleMethod) -> float:
        return math.inf if single.made is None or single.made.loss is None else single.made.loss

    best = min(point.singles, key=loss, default=None)
    return None if best is None or loss(best) == math.inf else best


def _print_forecast(found: FitReport) -> None:
    tokens = sum(each.tokens for each in found.text)
    kinds = ", ".join(f"{_short(each.name)} {each.weight:.0%}" for each in found.text)
    print_text(f"text: {tokens:,} tokens to measure on: {kinds}")
    for stage, seconds in found.seconds.items():
        print_text(f"{stage}: about {describe_duration(seconds / 3600)}")
    if found.seconds:
        print_text(f"together: about {describe_duration(sum(found.seconds.values()) / 3600)}")


def _short(name: str) -> str:
    """Returns a name of at most `MAX_NAME` columns of a terminal: the last folders that fit, or else its end."""
    from rich.cells import cell_len

    parts = name.split("/")
    ends = ["/".join(parts[start:]) for start in range(len(parts))] + [f"…{name[start:]}" for start in range(len(name))]
    return next(end for end in [name, *ends, ""] if cell_len(end) <= MAX_NAME)
