"""`refold evaluate`: scorecards of models, alone or against their source."""

from refold.cli import options
from refold.cli import score_options as scores


def command(
    models: scores.ScoredModels,
    data: scores.ScoredText = None,
    field: options.FieldOption = None,
    against: options.Against = None,
    tasks: scores.Tasks = None,
    task_data: scores.TaskData = None,
    shots: scores.Shots = None,
    limit: scores.TaskLimit = None,
    recall: scores.Recall = False,
    exits: scores.ScoreExits = False,
    branches: scores.Branches = False,
    noise: scores.Noise = False,
    speed: scores.Speed = False,
    amounts: scores.SetAmounts = None,
    seed: scores.ScoreSeed = 0,
    context: options.WindowContext = None,
    stride: options.Stride = None,
    max_tokens: options.MaxTokens = None,
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantise: options.QuantiseOption = None,
    out: scores.ScoreOut = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Measure bits per byte, few-shot tasks, recall, exits and speed, and agreement with another model."""
    from refold.cli.score_output import ScoreOutput, print_scores
    from refold.evaluation.settings import EvaluationSettings
    from refold.scorecard.amounts import read_amounts
    from refold.scorecard.settings import ScoreSettings

    text = EvaluationSettings(context, stride, max_tokens, batch_size, dtype, device, quantise)
    sections = {"recall": recall, "exits": exits, "branches": branches, "noise": noise, "speed": speed}
    settings = ScoreSettings(
        text,
        tasks=scores.split_names(tasks),
        task_data=task_data,
        shots=shots,
        limit=limit,
        **sections,
        seed=seed,
        amounts=read_amounts(amounts or (), [name for name, wanted in sections.items() if wanted]),
    )
    print_scores(models, options.locate_data(data, field), settings, against, ScoreOutput(out, overwrite, json))
