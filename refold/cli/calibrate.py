"""`refold calibrate`: thresholds of early exits that keep the tokens of the full depth."""

from refold.cli import options
from refold.cli.show import note, print_json, progress


def command(
    model: options.FoldedModel,
    data: options.DataOption,
    field: options.FieldOption = None,
    tolerance: options.Tolerance = None,
    confidence: options.Confidence = 0.95,
    measure: options.ConfidenceMeasure = None,
    kv: options.Kv = None,
    documents: options.MaxDocuments = 1000,
    tokens: options.CalibrationTokens = None,
    context: options.DocumentContext = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: options.ThresholdsFile = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Find thresholds of early exits for a tolerance, and store them beside the model."""
    from refold.cli.calibration_tables import print_thresholds
    from refold.engine.calibration import CalibrateOptions, calibrate
    from refold.engine.thresholds import place_of_thresholds

    first, *further = tolerance or [0.01]
    settings = CalibrateOptions(
        first,
        confidence,
        measure,
        kv,
        documents,
        tokens,
        context,
        seed=seed,
        dtype=dtype,
        device=device,
        further_tolerances=tuple(further),
    )
    place = place_of_thresholds(model, out, overwrite)
    with progress("calibrating", "documents") as report:
        found = calibrate(model, options.locate_data(data, field) or (), settings, progress=report)
    print_json(found.thresholds) if json else print_thresholds(found.thresholds)
    for line in found.notes:
        note(line)
    note(f"written: {found.thresholds.write(place, overwrite)}")
