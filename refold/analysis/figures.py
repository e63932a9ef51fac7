"""Figures of measurements, in colours that colour-blind readers can tell apart (Okabe and Ito's, cividis)."""

from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refold.sources.measurements import Matrix, Measurements

STYLES = (("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^"), ("#009E73", "D"))
"""Colour and marker of each line, because no figure relies on colour alone."""
WIDTH, HEIGHT = 5.0, 3.6
"""Size in inches; the text stays legible if a telephone shows a figure across its screen."""
MAX_WRITTEN = 14
"""Number of layers up to which a heat map shows its numbers."""


def draw_influence(found: Measurements) -> Figure:
    """Draws the influence of block, attention and MLP by layer."""
    figure, axes = _make()
    layers = range(len(found.influence.block))
    names = (("block", found.influence.block), ("attention", found.influence.attention), ("MLP", found.influence.mlp))
    for (name, values), (colour, marker) in zip(names, STYLES, strict=False):
        axes.plot(layers, np.maximum(values, 1e-9), color=colour, marker=marker, label=name)
    axes.set_yscale("log")
    _count_layers(axes)
    axes.set_xlabel("layer")
    axes.set_ylabel("influence: 1 − cosine similarity")
    axes.set_title("Influence of each layer")
    axes.legend(fontsize=8)
    return figure


def draw_weights(found: Measurements) -> Figure:
    """Draws the distance of weights between any two layers, mean over linears."""
    mean = np.mean([np.array(table) for table in found.similarity.weights.values()], axis=0)
    return _heatmap(mean, "layer", "relative distance", "Distance of weights")


def draw_streams(found: Measurements) -> Figure:
    """Draws the angular distance between the residual streams before any two layers."""
    return _heatmap(found.similarity.streams, "stream before layer", "angular distance (of π)", "Distance of streams")


def draw_spectra(found: Measurements) -> Figure:
    """Draws the share of the loss by each tying that LoRAs of each rank keep, over all linears."""
    figure, axes = _make()
    for spectra, (colour, marker) in zip(found.spectra, STYLES, strict=True):
        lost = np.array([each.lost for each in spectra.linears.values()])
        kept = np.array([each.kept for each in spectra.linears.values()])
        total = lost.sum() or 1.0
        label = f"{spectra.pattern}, {spectra.loops} loops: loses {lost.mean():.0%}"
        axes.plot(spectra.shares, (lost[:, None] * kept).sum(axis=0) / total, color=colour, marker=marker, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(found.spectra[0].shares, [f"1/{round(1 / share)}" for share in found.spectra[0].shares])
    axes.set_ylim(0, 1)
    axes.set_xlabel("LoRA rank, as a share of the full rank")
    axes.set_ylabel("kept share of what tying loses")
    axes.set_title("Kept by LoRAs, by way of tying")
    axes.legend(fontsize=8)
    return figure


def draw_moments(found: Measurements) -> Figure:
    """Draws the participation ratio of the inputs of linears by layer."""
    figure, axes = _make()
    for name, (colour, marker) in zip(found.moments[0], STYLES, strict=False):
        values = [layer[name].participation_ratio for layer in found.moments]
        axes.plot(range(len(values)), values, color=colour, marker=marker, label=f"input of {name}")
    axes.set_yscale("log")
    _count_layers(axes)
    axes.set_xlabel("layer")
    axes.set_ylabel("participation ratio (directions in use)")
    axes.set_title("Directions that inputs of linears use")
    axes.legend(fontsize=8)
    return figure


FIGURES: Mapping[str, Callable[[Measurements], Figure]] = {
    "influence": draw_influence,
    "weights": draw_weights,
    "streams": draw_streams,
    "spectra": draw_spectra,
    "moments": draw_moments,
}


def draw_all(found: Measurements) -> dict[str, Figure]:
    """Draws a figure of each measurement."""
    lacking = {name for name in ("spectra", "moments") if not getattr(found, name)}
    return {name: draw(found) for name, draw in FIGURES.items() if name not in lacking}


def _make(width: float = WIDTH) -> tuple[Figure, Axes]:
    # Without pyplot, which would need a window system and keep figures in memory.
    figure = Figure(figsize=(width, HEIGHT), layout="constrained")
    return figure, figure.subplots()


def _heatmap(values: Matrix | Any, place: str, quantity: str, title: str) -> Figure:
    """Draws distances between layers; the diagonal, which is 0, is not in the colour scale."""
    figure, axes = _make(HEIGHT * 1.25)
    table = np.array(values, dtype=float)
    np.fill_diagonal(table, np.nan)
    colours = matplotlib.colormaps["cividis"].copy()
    colours.set_bad("#cccccc")
    image = axes.imshow(table, cmap=colours)
    if len(table) <= MAX_WRITTEN:
        # Enough digits to distinguish the colours.
        digits = 3 if np.nanmax(table) - np.nanmin(table) < 0.05 else 2
        middle = np.nanmean([np.nanmin(table), np.nanmax(table)]) if len(table) > 1 else 0.0
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                dark = "black" if value > middle else "white"
                axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", color=dark, fontsize=8 - digits)
    _count_layers(axes)
    axes.locator_params(axis="y", integer=True)
    axes.set_xlabel(place)
    axes.set_ylabel(place)
    axes.set_title(title)
    figure.colorbar(image, label=quantity)
    return figure


def _count_layers(axes: Axes) -> None:
    axes.locator_params(axis="x", integer=True)
