"""The page of an analysis: one HTML file with all figures, and the same figures as separate files."""

import io
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup
from matplotlib import rc_context

from refold.analysis.conclusion import conclude, least_important, most_alike
from refold.analysis.figures import draw_all
from refold.pages.render import render_template
from refold.sources.measurements import Measurements

PAGE_NAME = "index.html"
TITLES: Mapping[str, str] = {
    "influence": "Influence",
    "weights": "Distance of weights",
    "streams": "Distance of streams",
    "spectra": "Loss by tying",
    "moments": "Directions in use",
}
MEASURES: Mapping[str, str] = {
    "influence": "Influence is one minus the cosine similarity of the residual stream before and after a layer: "
    "near 0, the layer hardly changes the stream and can be dropped; the larger, the more the model needs it.",
    "weights": "The relative distance of two layers' weights is |A - B| / sqrt(|A|² + |B|²), mean over linears: 0 for "
    "equal weights, which tie without loss, 1 for weights that have nothing in common.",
    "streams": "The angular distance of the residual stream before two layers, as a share of π: where it is small, the "
    "layers between change little together and can be dropped as a block.",
    "spectra": "Tying replaces the weights of several layers by their mean; the loss is the share of their energy "
    "(squared norm) that the mean does not hold, and the curves show the share of this loss that LoRAs of each rank "
    "keep.",
    "moments": "The participation ratio of a linear's inputs is the number of directions that carry them, "
    "tr(C)² / tr(C²) for their second moment C: few directions mean that a low rank loses little.",
}
"""The sentence that explains each measure, by the name of its figure."""


def write_page(found: Measurements, folder: Path) -> None:
    """Writes `index.html`, and each figure as PNG and SVG, into a folder.

    Raises:
        OSError: The disk is full or failed.
    """
    figures = {}
    # A fixed salt, so that the same measurements give the same file.
    with rc_context({"svg.hashsalt": "refold", "svg.fonttype": "none"}):
        for name, figure in draw_all(found).items():
            figure.savefig(folder / f"{name}.png", dpi=150)
            drawn = io.StringIO()
            figure.savefig(drawn, format="svg", metadata={"Date": None})
            (folder / f"{name}.svg").write_text(drawn.getvalue(), encoding="utf-8")
            figures[name] = Markup(drawn.getvalue()[drawn.getvalue().index("<svg") :])
    page = render_template(
        "refold.analysis",
        "page.html.jinja",
        found=found,
        name=found.source.path or f"{found.source.id}@{found.source.revision}",
        figures=figures,
        titles=TITLES,
        measures=MEASURES,
        conclusion=conclude(found),
        least=least_important(found.influence),
        alike=most_alike(found.similarity),
    )
    (folder / PAGE_NAME).write_text(page, encoding="utf-8")
