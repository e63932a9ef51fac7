"""The bench: contenders give the same tokens, figures are of the right quantities, mistakes are told before any run."""

import json
import shutil
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from refold.conversion.convert import ConvertOptions, convert
from refold.engine.engine import Engine
from refold.engine.settings import EngineSettings
from refold.errors import RefoldError
from refold.modeling.load import load_model
from refold.studies.bench import BenchSettings, bench, read_prices
from refold.studies.bench_result import FIGURE_NAME, FILE_NAME, Bench, require_free_bench
from refold.studies.contender import Contender, ContinuousContender, EngineContender, Served, StaticContender
from refold.studies.llama_server import find_gguf
from refold.studies.workload import Prompts, Workload, equal_lengths, mixed_lengths, poisson_arrivals

FOLD = {"fold": {"loops": 2}, "exits": {}}


@pytest.fixture(scope="module")
def source(make_source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A copy: the folder is shared with tests of sources without a tokenizer.
    folder = shutil.copytree(make_source("llama"), tmp_path_factory.mktemp("bench") / "source")
    words = WordLevel({f"token{index}": index for index in range(90)}, unk_token="token0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fold(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "fold"
    convert(source, folder, FOLD, options=ConvertOptions(allow_larger=True))
    return folder


def contenders(folder: Path) -> dict[str, Contender]:
    return {
        "engine": EngineContender(Engine(folder, EngineSettings(weights="float32", max_rows=3), device="cpu")),
        "static": StaticContender(load_model(folder, dtype="float32", device="cpu")),
        "continuous": ContinuousContender(load_model(folder, dtype="float32", device="cpu")),
    }


def tokens(served: list[Served]) -> list[tuple[int, ...]]:
    return [each.tokens for each in served]


@pytest.mark.parametrize("arrives", [False, True], ids=["at once", "arrivals"])
def test_contenders_give_the_same_tokens(source: Path, fold: Path, arrives: bool) -> None:
    work = mixed_lengths(Prompts(1, 60), count=5, prompt_tokens=6, num_new=4, rows=3)
    work = poisson_arrivals(work, rate=200.0, seed=2) if arrives else work
    found = {name: each.serve(work) for name, each in contenders(source).items()}
    assert tokens(found["engine"]) == tokens(found["static"]) == tokens(found["continuous"])
    assert [len(each) for each in tokens(found["engine"])] == [job.num_new for job in work.jobs]
    # Another model gives other tokens: the comparison can fail.
    assert tokens(EngineContender(Engine(fold, EngineSettings(max_rows=3))).serve(work)) != tokens(found["engine"])
    for served in found.values():
        assert all(0 < each.first_token <= each.finished for each in served)


def test_rows_bound_the_requests_that_run_together(source: Path) -> None:
    engine = Engine(source, EngineSettings(weights="float32", max_rows=4), device="cpu")
    most, step = 0, engine.step

    def watched() -> list:
        nonlocal most
        most = max(most, engine.statistics().running + engine.statistics().waiting)
        return step()

    engine.step = watched
    EngineContender(engine).serve(equal_lengths(Prompts(1, 60), 5, 4, 3, rows=2))
    assert most == 2


def test_arrivals_have_the_rate_and_repeat() -> None:
    work = equal_lengths(Prompts(0, 60), 2000, 1, 1, rows=8)
    first, again = (poisson_arrivals(work, rate=5.0, seed=3) for _ in range(2))
    arrivals = [job.arrival for job in first.jobs]
    gaps = [after - before for before, after in pairwise(arrivals)]
    assert first == again
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.1)
    # Exponential gaps spread as far as their mean; a fixed gap would not.
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.15)


def test_prompts_are_pieces_of_the_text() -> None:
    text = list(range(100, 200))
    piece = Prompts(4, 0, text).take(7)
    assert list(piece) == text[piece[0] - 100 : piece[0] - 93]


def test_the_gap_between_tokens_leaves_the_first_out() -> None:
    assert Served((1, 2, 3), first_token=1.0, finished=2.0).between_tokens == 0.5
    assert Served((1,), first_token=1.0, finished=1.0).between_tokens == 0.0


def test_a_bench_has_a_row_for_each_contender_and_scenario(source: Path, fold: Path, tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("here: 0.5\nthere: 2\n")
    settings = BenchSettings((3,), 50.0, num_arrivals=4, prompt_tokens=5, new_tokens=4, rounds=2, device="cpu")
    steps: list[tuple[int, int]] = []
    found = bench(
        fold,
        against=source,
        peers=True,
        settings=settings,
        prices=prices,
        on_progress=lambda done, total: steps.append((done, total)),
    )
    names = ["refold", "refold, lossless drafts", "refold, source", "transformers generate"]
    names.append("transformers generate_batch")
    assert [row.contender for row in found.rows] == names * 2
    assert list(dict.fromkeys(row.scenario for row in found.rows)) == ["batch 3", "50 per second"]
    assert list(BenchSettings((1, 3), 50.0).scenarios(60)) == ["batch 1", "batch 3", "50 per second"]
    assert steps[-1] == (len(names) * 2 * 2,) * 2
    for row in found.rows:
        assert row.tokens_per_price["here"] == pytest.approx(row.tokens_per_second.median * 7200)
        assert row.tokens_per_price["here"] == pytest.approx(4 * row.tokens_per_price["there"])
        assert (row.ratio.median == 1) == (row.contender == "refold")
        assert (row.accepted is not None) == ("drafts" in row.contender)
        assert row.first_token.p99 >= row.first_token.median > 0
        assert row.memory is None or row.memory >= 0
    # Thresholds are not calibrated, and there is no llama.cpp or no file for it: both are told.
    assert [note.split(":")[0] for note in found.notes] == ["refold, exits", "llama.cpp"]
    found.write(tmp_path / "out")
    assert Bench.model_validate(json.loads((tmp_path / "out" / FILE_NAME).read_text())) == found
    assert (tmp_path / "out" / FIGURE_NAME).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RefoldError, match="exists"):
        found.write(tmp_path / "out")
    found.write(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batches": ()}, r"batch: at least one number of requests is required \(got none\)"),
        ({"batches": (1, 0)}, r"batch: must lie in 1..1024 \(got 0\)"),
        ({"rate": 0.0}, r"rate: arrivals per second above 0 are required \(got 0.0\)"),
        ({"rate": float("nan")}, r"rate: .* \(got nan\)"),
        ({"rounds": 0}, r"rounds: must lie in 1..1000 \(got 0\)"),
        ({"new_tokens": 5000}, r"new_tokens: must lie in 1..4096 \(got 5000\)"),
        ({"weights": "int5"}, r"weights: must be one of .*int4.* \(got 'int5'\)"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict, says: str) -> None:
    with pytest.raises(RefoldError, match=says):
        BenchSettings(**settings)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"prices by machine are required \(got None\)"),
        ("- 3", r"prices by machine are required"),
        ("here: free", r"here: a price per hour above 0 is required \(got 'free'\)"),
        ("here: 0", r"here: a price per hour above 0 is required \(got 0\)"),
        ("here: .inf", r"here: a price per hour above 0"),
        ("here: true", r"here: a price per hour above 0"),
        ("here: [", r"valid YAML is required"),
    ],
)
def test_a_price_list_without_prices_is_told(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(RefoldError, match=says):
        read_prices(path)


def test_a_missing_price_list_is_told_before_any_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(RefoldError, match=r"prices: a readable YAML file is required \(got .*: No such file"):
        bench(tmp_path / "no-model", prices=tmp_path / "none.yaml")


def test_a_bench_never_replaces_another_file(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("mine")
    with pytest.raises(RefoldError, match="got another file"):
        require_free_bench(tmp_path, overwrite=True)


def test_llama_without_its_package_or_its_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_gguf(tmp_path) == "llama.cpp: not measured: the package xllamacpp is not installed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert find_gguf(tmp_path) == f"llama.cpp: not measured: {tmp_path} has no .gguf file"
    (tmp_path / "b.gguf").touch()
    assert find_gguf(tmp_path) == tmp_path / "b.gguf"


def test_a_workload_knows_its_sizes() -> None:
    work = Workload(equal_lengths(Prompts(0, 60), 3, 5, 2, rows=1).jobs, 1)
    assert (work.num_new, work.longest) == (6, 7)
