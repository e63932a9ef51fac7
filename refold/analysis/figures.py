"""Measurements as figures: colours that everybody can tell apart (Okabe and Ito's, cividis), all axes named."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refold.sources.measurements import Matrix, Measurements

STYLES = (("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^"), ("#009E73", "D"))
"""Colour and marker: no figure relies on colour alone."""
WIDTH, HEIGHT = 7.5, 4.0


def draw_influence(found: Measurements) -> Figure:
    """Influence of block, attention and MLP by layer."""
    figure, axes = _make()
    layers = range(len(found.influence.block))
    names = (("block", found.influence.block), ("attention", found.influence.attention), ("MLP", found.influence.mlp))
    for (name, values), (colour, marker) in zip(names, STYLES, strict=False):
        axes.plot(layers, np.maximum(values, 1e-9), color=colour, marker=marker, label=name)
    axes.set_yscale("log")
    _count_layers(axes)
    axes.set_xlabel("layer")
    axes.set_ylabel("influence: 1 − cosine similarity")
    axes.set_title("What each layer does to the stream")
    axes.legend()
    return figure


def draw_weights(found: Measurements) -> Figure:
    """Mean distance of all linears' weights between any two layers."""
    mean = np.mean([np.array(table) for table in found.similarity.weights.values()], axis=0)
    return _heatmap(mean, "layer", "relative distance: 0 equal, 1 nothing in common", "How far apart weights are")


def draw_streams(found: Measurements) -> Figure:
    """Angular distance between the streams before any two layers."""
    return _heatmap(found.similarity.streams, "stream before layer", "angular distance (of π)", "How far streams turn")


def draw_spectra(found: Measurements) -> Figure:
    """What LoRAs of a rank would give back of what each tying loses, over all linears."""
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
    axes.set_title("What LoRAs would give back, by way of tying")
    axes.legend()
    return figure


def draw_moments(found: Measurements) -> Figure:
    """How many directions the inputs of linears use."""
    figure, axes = _make()
    for name, (colour, marker) in zip(found.moments[0], STYLES, strict=False):
        values = [layer[name].participation_ratio for layer in found.moments]
        axes.plot(range(len(values)), values, color=colour, marker=marker, label=f"input of {name}")
    axes.set_yscale("log")
    _count_layers(axes)
    axes.set_xlabel("layer")
    axes.set_ylabel("participation ratio (directions in use)")
    axes.set_title("How many directions linears see")
    axes.legend()
    return figure


FIGURES: Mapping[str, Callable[[Measurements], Figure]] = {
    "influence": draw_influence,
    "weights": draw_weights,
    "streams": draw_streams,
    "spectra": draw_spectra,
    "moments": draw_moments,
}


def draw_all(found: Measurements) -> dict[str, Figure]:
    """Draws what was measured."""
    lacking = {name for name in ("spectra", "moments") if not getattr(found, name)}
    return {name: draw(found) for name, draw in FIGURES.items() if name not in lacking}


def _make(width: float = WIDTH) -> tuple[Figure, Axes]:
    # Without pyplot: no window system is asked for, and nothing is kept.
    figure = Figure(figsize=(width, HEIGHT), layout="constrained")
    return figure, figure.subplots()


def _heatmap(values: Matrix | Any, place: str, quantity: str, title: str) -> Figure:
    figure, axes = _make(HEIGHT * 1.3)
    image = axes.imshow(np.array(values), cmap="cividis", vmin=0)
    _count_layers(axes)
    axes.locator_params(axis="y", integer=True)
    axes.set_xlabel(place)
    axes.set_ylabel(place)
    axes.set_title(title)
    figure.colorbar(image, label=quantity)
    return figure


def _count_layers(axes: Axes) -> None:
    axes.locator_params(axis="x", integer=True)
