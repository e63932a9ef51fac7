"""`refold evaluate`: scores of a model on text, and its agreement with another model."""

from refold.cli import options
from refold.cli.show import note, print_json, progress


def command(
    model: options.Model,
    data: options.DataOption,
    field: options.FieldOption = None,
    against: options.Against = None,
    context: options.WindowContext = None,
    stride: options.Stride = None,
    max_tokens: options.MaxTokens = None,
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantise: options.QuantiseOption = None,
    out: options.JsonFile = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Measure bits per byte, perplexity and, against another model, agreement and KL."""
    from refold.cli.evaluation_tables import print_evaluation
    from refold.evaluation.evaluate import evaluate
    from refold.evaluation.result import require_free_evaluation
    from refold.evaluation.settings import EvaluationSettings

    if out is not None:
        require_free_evaluation(out, overwrite)
    settings = EvaluationSettings(context, stride, max_tokens, batch_size, dtype, device, quantise)
    with progress("evaluating", "windows") as report:
        texts = options.locate_data(data, field) or ()
        found = evaluate(model, texts, settings, against=against, progress=report)
    # Printed first, so that a disk that is full by now loses no result.
    print_json(found) if json else print_evaluation(found)
    for line in found.notes:
        note(line)
    if out is not None:
        found.write(out, overwrite)
