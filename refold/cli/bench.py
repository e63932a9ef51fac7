"""`refold bench`: speed of a model in the engine, beside its source and other engines."""

from refold.cli import options
from refold.cli.show import note, print_json, progress


def command(
    model: options.Model,
    against: options.BenchAgainst = None,
    peers: options.Peers = False,
    batch: options.Batches = "1,8,32",
    rate: options.Rate = None,
    prompt_tokens: options.PromptTokens = 64,
    max_new_tokens: options.BenchTokens = 64,
    rounds: options.Rounds = 5,
    weights: options.EngineWeights = "auto",
    prices: options.Prices = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    out: options.BenchFolder = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Measure tokens per second, waiting times and memory, offline and under random arrivals."""
    from refold.cli.bench_tables import print_bench
    from refold.studies.bench import BenchSettings, bench
    from refold.studies.bench_result import require_free_bench

    if out is not None:
        require_free_bench(out, overwrite)
    settings = BenchSettings(
        options.read_numbers("batch", batch),
        rate,
        prompt_tokens=prompt_tokens,
        new_tokens=max_new_tokens,
        rounds=rounds,
        weights=weights,
        seed=seed,
        device=device,
    )
    with progress("measuring", "runs") as report:
        found = bench(model, against=against, peers=peers, settings=settings, prices=prices, on_progress=report)
    print_json(found) if json else print_bench(found)
    for line in found.notes:
        note(line)
    if out is not None:
        found.write(out, overwrite)
