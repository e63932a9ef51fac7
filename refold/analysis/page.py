"""The page of an analysis: one file with all figures in it, and the same figures beside it."""

import io
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib import rc_context

from refold.analysis.figures import draw_all
from refold.analysis.ranking import least_important, most_alike
from refold.sources.measurements import Measurements

PAGE_NAME = "index.html"


def write_page(found: Measurements, folder: Path) -> None:
    """Writes `index.html`, and each figure as PNG and SVG, into a folder.

    Raises:
        OSError: The disk is full or failed.
    """
    figures = {}
    # The same measurements give the same file.
    with rc_context({"svg.hashsalt": "refold", "svg.fonttype": "none"}):
        for name, figure in draw_all(found).items():
            figure.savefig(folder / f"{name}.png", dpi=150)
            drawn = io.StringIO()
            figure.savefig(drawn, format="svg", metadata={"Date": None})
            (folder / f"{name}.svg").write_text(drawn.getvalue(), encoding="utf-8")
            figures[name] = Markup(drawn.getvalue()[drawn.getvalue().index("<svg") :])
    environment = Environment(loader=PackageLoader("refold.analysis", "."), autoescape=True)
    page = environment.get_template("page.html.jinja").render(
        found=found,
        name=found.source.path or f"{found.source.id}@{found.source.revision}",
        figures=figures,
        least=least_important(found.influence),
        alike=most_alike(found.similarity),
    )
    (folder / PAGE_NAME).write_text(page, encoding="utf-8")
