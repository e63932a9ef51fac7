"""Parts of the GPU benchmark on the engine: its tokens beside transformers' on the CPU, and its speed."""

import time
from pathlib import Path
from typing import Any

from device_parts import RECIPES, Bench, Found, Part
from timing import Spread

from refold.engine.engine import Engine
from refold.engine.settings import Drafts, EngineSettings
from refold.generation.sampling import Sampling
from refold.modeling.load import load_model
from refold.studies.contender import Contender, ContinuousContender, EngineContender, StaticContender
from refold.studies.workload import Prompts, mixed_lengths

EXIT_RECIPES: dict[str, dict[str, Any]] = {
    "exits": {"fold": {"loops": 2}, "exits": {}},
    "exits, keys of the first loop": {"fold": {"loops": 2}, "share_kv": {"from": "first_loop"}, "exits": {}},
}
OURS, THEIRS, STATIC = "engine", "transformers generate_batch", "transformers generate"
LEAST = 1.5
"""Times transformers' continuous batching."""


def tokens(bench: Bench) -> Found:
    """Greedy float32 tokens of the engine on the device beside transformers' `generate` on the CPU."""
    found = Found(("fold", "requests", "equal", "equal up to a tie", "lossless drafts"))
    for name, recipe in (RECIPES | EXIT_RECIPES).items():
        folder = bench.fold(bench.small, name.replace(" ", "-").replace(",", ""), recipe)
        work = mixed_lengths(Prompts(bench.seed, 500), count=8, prompt_tokens=24, num_new=16, rows=4)
        wanted = StaticContender(load_model(folder, dtype="float32", device="cpu")).serve(work)
        prompts = [list(job.prompt) for job in work.jobs]
        sampling = [Sampling(max_new_tokens=job.num_new, ignore_eos=True) for job in work.jobs]
        engine = Engine(folder, EngineSettings(weights="float32", max_rows=4), device=bench.device)
        made = [result.choices[0] for result in engine.generate(prompts, sampling)]
        equal = ties = 0
        for choice, row in zip(made, wanted, strict=True):
            places = [
                place for place, pair in enumerate(zip(choice.token_ids, row.tokens, strict=True)) if len({*pair}) > 1
            ]
            equal += not places
            ties += bool(places) and places[0] in choice.ties
        drafted = _drafted(bench, folder, prompts, sampling) if engine.passes.period or "exits" in recipe else None
        same = None if drafted is None else drafted == [choice.token_ids for choice in made]
        said = "-" if same is None else "equal" if same else "differ"
        found.rows.append((name, str(len(made)), str(equal), str(ties), said))
        found.targets.append(
            (
                f"engine, {name}: tokens of `generate` on the CPU",
                f"{equal} of {len(made)}, {ties} ties",
                equal + ties == len(made),
            )
        )
        if same is not None:
            found.targets.append((f"engine, {name}: lossless drafts change no token", said, same))
    return found


def _drafted(bench: Bench, folder: Path, prompts: list[list[int]], sampling: list[Sampling]) -> list[tuple[int, ...]]:
    settings = EngineSettings(weights="float32", max_rows=4, drafts=Drafts(adapt=False))
    results = Engine(folder, settings, device=bench.device).generate(prompts, sampling)
    return [result.choices[0].token_ids for result in results]


def speed(bench: Bench) -> Found:
    """New tokens per second of requests of mixed lengths in bfloat16, beside transformers' two ways to batch."""
    found = Found(("contender", "tokens/s", "over generate_batch"))
    rows, count, length = (32, 128, 128) if bench.is_gpu else (4, 8, 8)
    source = bench.trained_shape
    settings = EngineSettings(weights="bfloat16", max_rows=rows, share_prefixes=False)
    contenders: dict[str, Contender] = {
        OURS: EngineContender(Engine(source, settings, device=bench.device)),
        THEIRS: ContinuousContender(load_model(source, dtype="bfloat16", device=bench.device)),
        STATIC: StaticContender(load_model(source, dtype="bfloat16", device=bench.device)),
    }
    work = mixed_lengths(Prompts(bench.seed, 500), count, length, length, rows)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(bench.rounds + 1):
        for name, contender in contenders.items():
            bench.settle()
            begun = time.perf_counter()
            contender.serve(work)
            bench.settle()
            # The first round warms up.
            if number:
                seconds[name].append(time.perf_counter() - begun)
    for name, taken in seconds.items():
        gain = Spread.of([theirs / own for own, theirs in zip(taken, seconds[THEIRS], strict=True)]).median
        median = Spread.of([work.num_new / each for each in taken]).median
        found.rows.append((name, f"{median:,.0f}", f"{gain:.2f}"))
        if name == OURS:
            says = f"engine: at least {LEAST:g} times transformers' continuous batching"
            found.targets.append((says, f"{gain:.2f}", gain >= LEAST))
    return found


PARTS: dict[str, Part] = {
    "engine": Part(
        "Greedy float32 tokens on the device beside `generate` on the CPU, requests of mixed lengths in four rows; a "
        "difference counts as a tie where the engine says that the two likeliest logits nearly tie.",
        60,
        tokens,
    ),
    "batching": Part("Requests of mixed lengths that all come at once, bfloat16, prefill inside the clock.", 60, speed),
}
