"""`refold analyse`: influence and similarity of the layers of a source."""

from pathlib import Path
from typing import Annotated

import typer

from refold.cli import options
from refold.cli.show import print_json, progress


def command(
    source: options.SourceOption,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", help="Text, best of several kinds with weights: A=0.5. Default: random tokens."),
    ] = None,
    field: options.FieldOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write: measurements.json, figures, index.html.")] = None,
    tokens: options.AnalysisTokens = 16_384,
    context: options.Context = 512,
    seed: options.Seed = 0,
    moments: options.MomentsOption = False,
    no_spectra: options.NoSpectra = False,
    device: options.Device = "cpu",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Measure the influence of each layer, the similarity of layers, and the loss by tying them."""
    from refold.analysis.analyse import AnalysisSettings, analyse
    from refold.cli.analysis_tables import print_measurements

    settings = AnalysisSettings(tokens, context, seed, moments, not no_spectra, device or "cpu")
    with progress("analysing", "steps") as report:
        found = analyse(
            source, out, options.locate_data(data, field), settings=settings, overwrite=overwrite, progress=report
        )
    if json:
        print_json(found)
    else:
        print_measurements(found, source, out)
