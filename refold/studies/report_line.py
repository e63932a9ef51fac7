"""The one line one would forward to a colleague."""

from refold.conversion.plan import Plan


def describe_size(ratio: float) -> str:
    """`48% smaller`, `12% larger` or `the same size`."""
    change = round(abs(1 - ratio) * 100)
    return "the same size" if change == 0 else f"{change}% {'smaller' if ratio < 1 else 'larger'}"


def describe_loss(difference: float, error: float | None = None) -> str:
    """`+0.041`, with its standard error where one is known and it matters."""
    certain = error is None or abs(difference) >= 2 * error
    return f"{difference:+.3f}" + ("" if certain else f" ± {error:.3f}")


def report_line(
    name: str,
    plan: Plan,
    difference: float,
    difference_error: float | None,
    baselines: dict[str, float],
    context: int,
) -> str:
    """Says what was saved and what it cost.

    Args:
        name: Of the recipe.
        plan: Carried out.
        difference: Bits per byte above the source.
        difference_error: Its standard error.
        baselines: What a rival costs in bits per byte above the source, by description.
        context: Tokens at which cache and FLOPs are compared.
    """
    rows = {row.quantity: row.ratio for row in plan.summary(context)}
    rivals = ", ".join(f"{rival}: {describe_loss(lost)}" for rival, lost in baselines.items())
    size = describe_size(rows["weight_bytes"] or 1.0)
    loss = f"{describe_loss(difference, difference_error)} bits per byte to the source"
    cache, compute = (1.0 if rows[key] is None else rows[key] for key in ("cache_bytes", "flops"))
    return f"{name}: {size}, {loss}{f' ({rivals})' if rivals else ''}, cache {cache:.2f}x, compute {compute:.2f}x"
