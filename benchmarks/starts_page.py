"""The page and the figure of `starts.py`."""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from page import Page, table

Row = dict[str, Any]
GOALS = ((0.67, 0.08), (0.6, 0.15))
"""Targets of an unhealed arm of refold: nats over the source by share of the linear weights."""
RIVAL = "low rank, weight: activations (SVD-LLM)"
LEAST = 1e-4
"""Smallest loss that is drawn; the axis of losses is logarithmic."""
COLOURS = ("#7F7F7F", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^DvPX*<>hp"
"""Seven colours that are easy to distinguish and twelve markers, for 84 different arms."""


@dataclass
class Found:
    """All results of the study.

    Attributes:
        given: Arguments of the study.
        source: Result of the source.
        quantised: Results of the quantised source by scheme.
        rows: Results by arm, share of the linear weights, and scheme (None: not quantised).
        calibrated: Results by arm and calibration text, at one size.
        healed_source: Results of the source after the same training.
        healed: Results by arm and share.
    """

    given: argparse.Namespace
    source: Row
    quantised: dict[str, Row]
    rows: dict[tuple[str, float, str | None], Row] = field(default_factory=dict)
    calibrated: dict[tuple[str, str], Row] = field(default_factory=dict)
    healed_source: Row | None = None
    healed: dict[tuple[str, float], Row] = field(default_factory=dict)

    @property
    def shares(self) -> list[float]:
        return sorted({share for _, share, _ in self.rows})

    def lost(self, row: Row) -> float:
        """Nats per token over the source."""
        return row["nats"] - self.source["nats"]

    def healed_losses(self, row: Row) -> list[float]:
        """Nats per token over the untrained source, by seed."""
        return [nats - self.source["nats"] for nats in row["nats"].values()]


def render(page: Page, found: Found, arms: Sequence[str], ours: Sequence[str]) -> None:
    """Writes the sections and targets of the page.

    Args:
        page: The page.
        found: The results.
        arms: Names of all arms in order.
        ours: Names of refold's arms.
    """
    given = found.given
    page.section("Loss over the source, in nats per token", _losses(found, arms))
    if given.write is not None:
        page.section("Loss over stored bytes", f"![Loss over stored bytes]({given.write.with_suffix('.png').name})")
    page.section("With quantised weights", _quantised(found))
    page.section(f"All arms at {given.shares[0]:.0%}", _one_size(found))
    if found.calibrated:
        page.section(f"Other calibration text, at {given.shares[0]:.0%}", _calibrated(found))
    if found.healed:
        page.section(f"Healed for {given.heal_tokens:,} tokens", _healed(found))
    _targets(page, found, ours)


def _losses(found: Found, arms: Sequence[str]) -> str:
    given = found.given

    def cell(name: str, share: float) -> str:
        row = found.rows.get((name, share, None))
        if row is None:
            return "-"
        off = "" if abs(row["share"] - share) < 0.01 else f" ({row['share']:.0%})"
        return f"{found.lost(row):+.3f}{off}"

    return (
        f"The source, `{Path(given.source).name}`, has {found.source['nats']:.4f} on {given.eval_tokens:,} held-out "
        f"tokens (context {given.context}). Columns: share of its linear weights that is stored, LoRAs included; in "
        f"brackets where it is another. Moments and influence come from {given.tokens:,} tokens of "
        f"`{given.train.name}`. Evaluated in {given.dtype}.\n\n"
        + table(
            ["start", *(f"{share:.0%}" for share in found.shares)],
            [[name, *(cell(name, share) for share in found.shares)] for name in arms],
        )
    )


def _quantised(found: Found) -> str:
    header = ["model", "share of the linear weights", "bytes", "nats", "nats by quantisation"]
    lines = [
        [f"the source, {scheme}", "100.0%", f"{row['bytes']:.1%}", f"{found.lost(row):+.4f}", f"{found.lost(row):+.4f}"]
        for scheme, row in found.quantised.items()
    ]
    for (name, share, scheme), row in sorted(found.rows.items(), key=lambda each: (each[0][0], -each[0][1])):
        whole = found.rows.get((name, share, None))
        if scheme is not None and whole is not None:
            more = row["nats"] - whole["nats"]
            model = f"{name}, {scheme}"
            lines.append(
                [model, f"{row['share']:.1%}", f"{row['bytes']:.1%}", f"{found.lost(row):+.4f}", f"{more:+.4f}"]
            )
    return (
        "Linears rounded to the nearest integers (`refold evaluate --quantise`): `int8` with a scale for each output, "
        "`int4` with a scale and a zero point for each 32 inputs. Bytes: of all weights, over the source's, "
        "where two bytes stand for a number that is not quantised, as in bfloat16.\n\n" + table(header, lines)
    )


def _one_size(found: Found) -> str:
    header = ["start", "stored", "bytes", "bits per byte over the source", "FLOPs"]
    lines = [
        [
            name,
            f"{row['share']:.1%}",
            f"{row['bytes']:.1%}",
            f"{row['bits_per_byte'] - found.source['bits_per_byte']:+.4f}",
            f"{row['flops']:.2f}x",
        ]
        for (name, share, scheme), row in found.rows.items()
        if share == found.given.shares[0] and scheme is None
    ]
    return table(header, lines)


def _calibrated(found: Found) -> str:
    share, lines = found.given.shares[0], []
    for (name, text), row in found.calibrated.items():
        lines.append([name, text, f"{found.lost(row):+.4f}"])
    for name in dict.fromkeys(name for name, _ in found.calibrated):
        row = found.rows.get((name, share, None))
        if row is not None:
            lines.append(
                [name, f"{found.given.tokens:,} tokens of {found.given.train.stem}", f"{found.lost(row):+.4f}"]
            )
    return table(["start", "text", "nats"], sorted(lines, key=lambda line: line[0]))


def _healed(found: Found) -> str:
    given = found.given
    header = ["start", "stored", "unhealed", "healed, by seed", "mean", "learning rate", "FLOPs"]
    lines = []
    for (name, share), row in sorted(found.healed.items(), key=lambda each: (-each[0][1], _mean(found, each[1]))):
        losses, before = found.healed_losses(row), found.rows.get((name, share, None))
        told = ["-", "-", "-"] if before is None else []
        if before is not None:
            told = [f"{before['share']:.1%}", f"{found.lost(before):+.3f}", f"{before['flops']:.2f}x"]
        by_seed = " / ".join(f"{loss:+.4f}" for loss in losses)
        mean = f"**{statistics.mean(losses):+.4f}**"
        lines.append([name, told[0], told[1], by_seed, mean, f"{row['rate']:g}", told[2]])
    if found.healed_source is not None:
        losses = found.healed_losses(found.healed_source)
        by_seed = " / ".join(f"{loss:+.4f}" for loss in losses)
        rate = f"{found.healed_source['rate']:g}"
        lines.append(
            ["the source, trained alike", "100.0%", "+0.000", by_seed, f"{statistics.mean(losses):+.4f}", rate, "1.00x"]
        )
    return (
        f"Nats per token over the source as it is; seeds {', '.join(map(str, given.seeds))}, {given.batch_tokens:,} "
        f"tokens a step, context {given.context}, half cross-entropy and half KL to the source. The learning rate was "
        f"chosen for each arm among {', '.join(f'{rate:g}' for rate in given.rates)} by runs of "
        f"{given.sweep_tokens:,} tokens.\n\n" + table(header, lines)
    )


def _mean(found: Found, row: Row) -> float:
    return statistics.mean(found.healed_losses(row))


def _targets(page: Page, found: Found, ours: Sequence[str]) -> None:
    def best_of(share: float) -> tuple[float, str] | None:
        rows = {name: found.rows[name, share, None] for name in ours if (name, share, None) in found.rows}
        return min(((found.lost(row), name) for name, row in rows.items()), default=None)

    for share, most in GOALS:
        best = best_of(share)
        if best is not None:
            page.target(f"at {share:.0%} at most +{most} nats", f"{best[0]:+.3f} ({best[1]})", best[0] <= most)
    for share in found.shares:
        best, rival = best_of(share), found.rows.get((RIVAL, share, None))
        if share >= 0.5 and best is not None and rival is not None:
            theirs = found.lost(rival)
            says = f"at {share:.0%} below whitened low rank"
            page.target(says, f"{best[0]:+.3f} against {theirs:+.3f}", best[0] < theirs)
    for share in sorted({share for _, share in found.healed}):
        means = {name: _mean(found, row) for (name, at), row in found.healed.items() if at == share}
        best = min(means, key=lambda name: means[name])
        says = f"at {share:.0%}, healed, the best is refold's"
        page.target(says, f"{means[best]:+.4f} ({best})", best in ours)


def draw(found: Found, arms: Sequence[str]) -> Figure:
    """Draws loss over stored bytes: one panel before healing, and one after healing if there is any."""
    panels = 2 if found.healed else 1
    figure = Figure(figsize=(6.4 * panels + 4.6, 5.6), layout="constrained")
    axes = figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0]
    looks = {name: (COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]) for index, name in enumerate(arms)}
    schemes = {None: "-", **dict(zip(found.quantised, ("--", ":"), strict=True))}
    for name in arms:
        for scheme, line in schemes.items():
            points = [
                (row["bytes"], found.lost(row))
                for (arm, _, by), row in found.rows.items()
                if (arm, by) == (name, scheme)
            ]
            label = name if scheme is None else f"{name}, {scheme}"
            _plot(axes[0], points, label, *looks[name], line)
        healed = [
            (found.rows[arm, share, None]["bytes"], _mean(found, row))
            for (arm, share), row in found.healed.items()
            if arm == name and (arm, share, None) in found.rows
        ]
        if healed:
            _plot(axes[-1], healed, "_healed", *looks[name], "-")
    for scheme, row in found.quantised.items():
        for panel in axes:
            label = f"the source, {scheme}" if panel is axes[0] else "_source"
            point = ([row["bytes"]], [max(found.lost(row), LEAST)])
            panel.plot(*point, linestyle="none", color="black", marker=f"${scheme}$", markersize=22, label=label)
    for panel, title in zip(axes, ("before healing", f"healed for {found.given.heal_tokens:,} tokens"), strict=False):
        panel.set_yscale("log")
        panel.set_xlabel("weight bytes, of the source's in bfloat16")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.set_title(title)
        panel.grid(True, which="major", alpha=0.3)
    axes[0].set_ylabel(f"loss over the source, nats per token (at least {LEAST:g})")
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def _plot(axes: Axes, points: Sequence[tuple[float, float]], label: str, colour: str, marker: str, line: str) -> None:
    if points:
        ordered = sorted((size, max(loss, LEAST)) for size, loss in points)
        face = colour if line == "-" else "none"
        axes.plot(*zip(*ordered, strict=True), line, color=colour, marker=marker, markerfacecolor=face, label=label)
