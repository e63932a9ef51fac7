"""Speed of a model in refold's engine, beside its source and other engines, offline and under random arrivals."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from refold.blueprint.passes import find_passes
from refold.engine.engine import Engine
from refold.engine.process_memory import forget_peak, read_peak
from refold.engine.settings import Drafts, EngineSettings
from refold.errors import RefoldError, given_or_default
from refold.evaluation.evaluate import describe_machine
from refold.modeling.load import choose_device, load_model
from refold.recipe.yaml import parse_yaml
from refold.studies.bench_result import Bench, BenchRow, Latency, Quartiles
from refold.studies.contender import Contender, ContinuousContender, EngineContender, Served, StaticContender
from refold.studies.llama_server import LlamaContender, find_gguf
from refold.studies.workload import Prompts, Workload, equal_lengths, longest_of, mixed_lengths, poisson_arrivals
from refold.suggest import shorten

SECONDS_PER_HOUR = 3600
MAX_ROWS, MAX_TOKENS, MAX_ROUNDS = 1024, 4096, 1000


@dataclass(frozen=True)
class BenchSettings:
    """Settings of a bench.

    Attributes:
        batches: Numbers of requests that come at once, each with as many rows.
        rate: Mean number of arrivals per second; None: no arrivals.
        num_arrivals: Number of requests that arrive.
        prompt_tokens: Tokens of a prompt; with arrivals their mean.
        new_tokens: New tokens of a request; with arrivals their mean.
        rounds: Rounds over all contenders.
        weights: Weights of refold's engine, as in `EngineSettings`.
        seed: Seed of prompts and arrivals.
        device: Device of all contenders; None: the best there is.

    Raises:
        RefoldError: A number is out of range.
    """

    batches: tuple[int, ...] = (1, 8, 32)
    rate: float | None = None
    num_arrivals: int = 32
    prompt_tokens: int = 64
    new_tokens: int = 64
    rounds: int = 5
    weights: str = "auto"
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        if not self.batches:
            raise RefoldError("batch: at least one number of requests is required (got none)")
        ranges = {
            "batch": (self.batches, MAX_ROWS),
            "num_arrivals": ((self.num_arrivals,), MAX_TOKENS),
            "prompt_tokens": ((self.prompt_tokens,), MAX_TOKENS),
            "new_tokens": ((self.new_tokens,), MAX_TOKENS),
            "rounds": ((self.rounds,), MAX_ROUNDS),
        }
        for name, (values, most) in ranges.items():
            for value in values:
                if not 1 <= value <= most:
                    raise RefoldError(f"{name}: must lie in 1..{most} (got {shorten(value)})")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise RefoldError(f"rate: arrivals per second above 0 are required (got {self.rate})")
        EngineSettings(weights=self.weights)

    def scenarios(self, vocab_size: int) -> dict[str, Workload]:
        """Returns the workloads by name."""
        prompts = Prompts(self.seed, vocab_size)
        found = {
            f"batch {rows}": equal_lengths(prompts, rows, self.prompt_tokens, self.new_tokens, rows)
            for rows in self.batches
        }
        if self.rate is not None:
            rows = max(self.batches)
            mixed = mixed_lengths(prompts, self.num_arrivals, self.prompt_tokens, self.new_tokens, rows)
            found[f"{self.rate:g} per second"] = poisson_arrivals(mixed, self.rate, self.seed)
        return found


@dataclass
class _Entrant:
    """A loaded contender.

    Attributes:
        name: Its name in tables.
        contender: The contender.
        held: Bytes that loading it added.
        engine: Refold's engine, if it is one.
    """

    name: str
    contender: Contender
    held: int | None
    engine: Engine | None = None


def bench(
    model: str | Path,
    *,
    against: str | Path | None = None,
    peers: bool = False,
    settings: BenchSettings | None = None,
    prices: str | Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bench:
    """Measures how fast a model answers requests, and how much memory that takes.

    All contenders run in every round, in reversed order every other round. A folded model runs at full depth, and also
    with calibrated exits and with lossless drafts where it has them.

    Args:
        model: Folder or hub id of a model, folded or not.
        against: Its source, which the engine runs too.
        peers: Also run transformers' `generate` and continuous batching, and llama.cpp where it is installed and a
            `.gguf` file lies beside the model; the source's if there is one, else the model's.
        settings: Settings; None: the defaults.
        prices: YAML file of machine names to prices per hour, for tokens per unit of money at the speed measured here.
        on_progress: Called with the number of finished runs and of all runs.

    Raises:
        RefoldError: A setting, the price list or a model is not usable.
    """
    settings = given_or_default(settings, BenchSettings, "settings")
    paid = {} if prices is None else read_prices(prices)
    device = choose_device(settings.device)
    notes: list[str] = []
    entrants = _engines("refold", model, settings, device, notes)
    if against is not None:
        entrants += _engines("refold, source", against, settings, device, notes)
    if peers:
        entrants += _peers(model if against is None else against, settings, device, notes)
    first = entrants[0].engine
    assert first is not None
    vocab_size = cast("nn.Embedding", first.model.get_input_embeddings()).num_embeddings
    scenarios = settings.scenarios(vocab_size)
    rows: list[BenchRow] = []
    total, done = len(scenarios) * settings.rounds * len(entrants), 0
    for name, workload in scenarios.items():
        runs = [_Runs(entrant, workload) for entrant in entrants]
        for each in runs:
            each.warm_up()
        for number in range(settings.rounds):
            for each in runs if number % 2 == 0 else runs[::-1]:
                each.run(device)
                done += 1
                on_progress(done, total)
        rows += [each.row(name, runs[0], paid) for each in runs]
    for entrant in entrants:
        entrant.contender.close()
    return Bench(
        model=str(model),
        against=None if against is None else str(against),
        machine=describe_machine(device),
        settings={**asdict(settings), "batches": list(settings.batches)},
        rows=tuple(rows),
        notes=tuple(notes),
    )


def read_prices(path: str | Path) -> dict[str, float]:
    """Reads a YAML file of machine names to prices per hour.

    Raises:
        RefoldError: The file is missing, or an entry is no price.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RefoldError(f"prices: a readable YAML file is required (got {path}: {reason}); check the path") from None
    content = parse_yaml(text, str(path))
    if not isinstance(content, Mapping) or not content:
        raise RefoldError(f"{path}: prices by machine are required (got {shorten(content)}); write `my-server: 0.40`")
    for name, price in content.items():
        is_number = isinstance(price, int | float) and not isinstance(price, bool)
        if not is_number or not 0 < price < math.inf:
            raise RefoldError(f"{path}: {name}: a price per hour above 0 is required (got {shorten(price)})")
    return {str(name): float(price) for name, price in content.items()}


def _engines(
    name: str, model: str | Path, settings: BenchSettings, device: torch.device, notes: list[str]
) -> list[_Entrant]:
    """Returns the engine at full depth and, for a folded model, with each way to run less that it offers."""
    base = {"weights": settings.weights, "max_rows": max(settings.batches), "max_context": _context(settings)}
    # Every round has the same prompts: shared prefixes would save their prefill from the second on.
    base |= {"chunk": max(512, base["max_rows"]), "share_prefixes": False}

    def load(label: str, **more: Any) -> _Entrant:
        def make() -> EngineContender:
            return EngineContender(Engine(model, EngineSettings(**base, **more), device=device))

        contender, held = _loaded(make, device)
        return _Entrant(label, contender, held, contender.engine)

    found = [load(name)]
    engine = found[0].engine
    assert engine is not None
    passes = find_passes(engine.model.config.read_blueprint())
    has_exits = any(segment.is_exit for segment in passes.segments)
    ways: dict[str, dict[str, Any]] = {"exits": {"exits": "calibrated"}} if has_exits else {}
    if has_exits or passes.period:
        ways["lossless drafts"] = {"drafts": Drafts()}
    for label, more in ways.items():
        try:
            found.append(load(f"{name}, {label}", **more))
        except RefoldError as error:
            notes.append(f"{name}, {label}: not measured: {error}")
    return found


def _peers(model: str | Path, settings: BenchSettings, device: torch.device, notes: list[str]) -> list[_Entrant]:
    dtype = settings.weights if settings.weights in ("float32", "bfloat16") else None
    kinds = {"transformers generate": StaticContender, "transformers generate_batch": ContinuousContender}
    found = []
    for name, kind in kinds.items():
        contender, held = _loaded(lambda kind=kind: kind(load_model(model, dtype=dtype, device=device)), device)
        found.append(_Entrant(name, contender, held))
    file = find_gguf(Path(model))
    if isinstance(file, str):
        notes.append(file)
    else:
        contender, held = _loaded(lambda: LlamaContender(file, max(settings.batches), _context(settings)), device)
        found.append(_Entrant(f"llama.cpp, {file.name}", contender, held))
    return found


def _context(settings: BenchSettings) -> int:
    """Returns the number of tokens that the longest request may have."""
    means = settings.prompt_tokens, settings.new_tokens
    return sum(means) if settings.rate is None else sum(map(longest_of, means))


class _Runs:
    """The runs of one contender in one scenario."""

    def __init__(self, entrant: _Entrant, workload: Workload):
        self.entrant, self.workload = entrant, workload
        self.speeds: list[float] = []
        self.served: list[Served] = []
        self.peaks: list[int] = []

    def warm_up(self) -> None:
        """Runs the first requests, all at once, for a few tokens."""
        jobs = [job._replace(arrival=0.0, num_new=min(4, job.num_new)) for job in self.workload.jobs]
        self.entrant.contender.serve(Workload(tuple(jobs[: self.workload.rows]), self.workload.rows))

    def run(self, device: torch.device) -> None:
        """Runs all requests once."""
        before = forget_peak(device)
        served = self.entrant.contender.serve(self.workload)
        peak = read_peak(device)
        if before is not None and peak is not None:
            self.peaks.append(peak - before)
        ends = [job.arrival + each.finished for job, each in zip(self.workload.jobs, served, strict=True)]
        self.speeds.append(self.workload.num_new / (max(ends) - self.workload.jobs[0].arrival))
        self.served += served

    def row(self, scenario: str, first: "_Runs", prices: Mapping[str, float]) -> BenchRow:
        """Returns the figures."""
        speed = Quartiles.of(self.speeds)
        held, engine = self.entrant.held, self.entrant.engine
        return BenchRow(
            contender=self.entrant.name,
            scenario=scenario,
            tokens_per_second=speed,
            ratio=Quartiles.of([own / other for own, other in zip(self.speeds, first.speeds, strict=True)]),
            first_token=Latency.of([each.first_token for each in self.served]),
            between_tokens=Latency.of([each.between_tokens for each in self.served]),
            memory=None if held is None or not self.peaks else held + max(self.peaks),
            depths=_mean_depths(self.served, engine),
            accepted=None if engine is None or engine.settings.drafts is None else engine.statistics().acceptance,
            tokens_per_price={name: speed.median * SECONDS_PER_HOUR / price for name, price in prices.items()},
        )


def _mean_depths(served: Sequence[Served], engine: Engine | None) -> float | None:
    depths = [depth for each in served for depth in each.depths]
    if engine is None or not depths:
        return None
    return sum(depths) / len(depths) / cast("int", engine.model.config.num_hidden_layers)


def _loaded(make: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """Calls a function; returns its result and the bytes by which the memory has grown."""
    before = forget_peak(device)
    made = make()
    after = forget_peak(device)
    return made, None if before is None or after is None else max(0, after - before)
