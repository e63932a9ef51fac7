"""Requests with several sets of adapters share launches, and each gets the tokens of its own set alone."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from refold.conversion.convert import ConvertOptions, convert
from refold.engine.engine import Engine
from refold.engine.exits import ExitRule
from refold.engine.prefixes import PrefixCache
from refold.engine.settings import AttentionWorkers, Drafts, EngineSettings
from refold.errors import FolderError, RefoldError
from refold.generation.sampling import Sampling
from refold.modeling.adapters import load_adapters
from refold.modeling.load import load_model
from refold.serve.host import EngineHost
from refold.serve.messages import Ended, EngineFacts, GenerationJob, Refused, StopEngine, TextPart, WireMessage
from tests.engine.conftest import FOLD, MODELS, greedy, make_prompts, options
from tests.engine.test_exits import calibrated

RANKS = {"rank": 3, "vectors": "own"}
FOLDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: MODELS[name] for name in ("relaxed", "own vectors", "gains", "prefix", "exits")},
    "basis": (
        "llama",
        {"fold": FOLD, "relax": {"rank": 2}, "factor": {"parameters": 0.6, "share": "basis", "weight": "none"}},
    ),
    "first keys": ("llama", {"fold": FOLD, "relax": {"rank": 2}, "share_kv": {"from": "first_loop"}, "exits": {}}),
    "recurrent": ("llama", {"fold": FOLD, "relax": RANKS, "mixers": [{"type": "mamba2", "depths": [1, 3]}]}),
}
NAMES = ("law", "medicine", "poems")
KINDS = (".lora.", ".gain.", ".prefix")


class Domains(NamedTuple):
    base: Path
    folders: dict[str, Path]


@pytest.fixture(scope="session")
def domains(make_source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Domains]:
    """Makes folders that differ in their adapters alone; each fold is made once."""
    made: dict[str, Domains] = {}

    def make(fold: str) -> Domains:
        if fold not in made:
            variant, recipe = FOLDS[fold]
            folder = tmp_path_factory.mktemp("domains")
            convert(make_source(variant), folder / "base", recipe, options=ConvertOptions(allow_larger=True))
            model = load_model(folder / "base", device="cpu")
            for seed, name in enumerate(NAMES):
                generator = torch.Generator().manual_seed(seed)
                for tensor, weight in model.named_parameters():
                    if any(kind in tensor for kind in KINDS):
                        weight.data.copy_(0.3 * torch.randn(weight.shape, generator=generator) + (".gain." in tensor))
                model.save_pretrained(folder / name)
            made[fold] = Domains(folder / "base", {name: folder / name for name in NAMES})
        return made[fold]

    return make


def short(count: int = 8, **given: Any) -> Sampling:
    return Sampling(max_new_tokens=count, ignore_eos=True, **given)


def open_all(found: Domains, **given: Any) -> Engine:
    engine = Engine(found.base, EngineSettings(**options(max_rows=8, **given)), device="cpu")
    for name, folder in found.folders.items():
        engine.add_adapters(name, folder)
    return engine


SWAPPED: dict[tuple[Path, str | None], Any] = {}


def swapped(found: Domains, name: str | None) -> Any:
    """Returns the model with other adapters loaded in place of its own."""
    if (found.base, name) not in SWAPPED:
        SWAPPED[found.base, name] = model = load_model(found.base, device="cpu")
        if name is not None:
            load_adapters(model, found.folders[name])
    return SWAPPED[found.base, name]


CHOICES: tuple[str | None, ...] = ("law", None, "medicine", "law", "poems", "medicine", None, "poems")


def tokens(engine: Engine, prompts: Sequence[list[int]], adapter: Any = None, sampling: Any = None) -> list[list[int]]:
    results = engine.generate(prompts, sampling or short(), adapter=adapter)
    return [list(each.choices[0].token_ids) for each in results]


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("is_packed", [True, False])
def test_each_row_gets_the_tokens_of_its_own_adapters(domains, fold, is_packed):
    found, prompts = domains(fold), make_prompts((5, 9, 17, 3, 12, 8, 5, 21))
    if is_packed:
        engine = open_all(found, weights="float32")
    else:
        engine = Engine(load_model(found.base, device="cpu"), EngineSettings(**options(max_rows=8)))
        for name, folder in found.folders.items():
            engine.add_adapters(name, folder)
    expected = [greedy(swapped(found, name), prompt, 8) for name, prompt in zip(CHOICES, prompts, strict=True)]
    assert tokens(engine, prompts, CHOICES) == expected
    # The control: other adapters give other tokens.
    assert tokens(engine, prompts, [*CHOICES[1:], CHOICES[0]]) != expected


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("fold", ["relaxed", "basis"])
def test_packed_rows_get_the_logits_of_their_own_adapters(domains, fold, weights):
    found, prompts = domains(fold), make_prompts((5, 9, 17, 3, 12, 8, 5, 21))
    given = {"weights": weights, "keep_dense": False}
    engine, sampling = open_all(found, **given), short(logprobs=0)
    results = engine.generate(prompts, sampling, adapter=CHOICES)
    for name in dict.fromkeys(CHOICES):
        alone = Engine(swapped(found, name), EngineSettings(**options(max_rows=8, **given)))
        indices = [index for index, choice in enumerate(CHOICES) if choice == name]
        for index, expected in zip(indices, alone.generate([prompts[each] for each in indices], sampling), strict=True):
            choice, wanted = results[index].choices[0], expected.choices[0]
            assert choice.token_ids == wanted.token_ids
            assert choice.logprobs is not None
            assert wanted.logprobs is not None
            for mine, theirs in zip(choice.logprobs, wanted.logprobs, strict=True):
                assert mine.logprob == pytest.approx(theirs.logprob, abs=0.1)


def launched(engine: Engine, prompts: list[list[int]], adapter: Any) -> int:
    before = engine.statistics().counts.launches
    tokens(engine, prompts, adapter)
    return engine.statistics().counts.launches - before


def test_rows_with_several_adapters_share_the_launches_of_rows_with_one(domains):
    engine, prompts = open_all(domains("relaxed"), share_prefixes=False), make_prompts((5,) * 8)
    assert launched(engine, prompts, CHOICES) == launched(engine, prompts, "law")


LONG = make_prompts((30,))[0]


@pytest.mark.parametrize("fold", ["relaxed", "prefix", "recurrent"])
def test_prefixes_are_shared_among_rows_with_the_same_adapters_alone(domains, fold, monkeypatch):
    found = domains(fold)
    prompts = [LONG[: 20 + place] for place in (0, 1, 2, 3)]
    chosen: list[str | None] = ["law", None, "medicine", "law"]

    def answer() -> tuple[list[list[int]], list[int]]:
        engine = open_all(found)
        asked = zip(prompts, chosen, strict=True)
        results = [engine.generate([prompt], short(), adapter=[name])[0] for prompt, name in asked]
        return [list(each.choices[0].token_ids) for each in results], [each.cached_tokens for each in results]

    expected = [greedy(swapped(found, name), prompt, 8) for prompt, name in zip(prompts, chosen, strict=True)]
    answers, cached = answer()
    assert answers == expected
    assert cached[:3] == [0, 0, 0]
    assert cached[3] >= 16
    # The control: with one chain for all adapters, rows read the keys and states of others.
    monkeypatch.setattr(PrefixCache, "_root", lambda cache, owner: -1)
    answers, cached = answer()
    assert answers != expected
    assert min(cached[1:]) >= 16


@pytest.mark.parametrize("preemption", ["recompute", "copy"])
def test_adapters_survive_preemption_and_many_choices(domains, preemption):
    found, prompts = domains("prefix"), make_prompts((9, 11, 14, 10))
    full = Engine(found.base, EngineSettings(**options()), device="cpu").statistics().memory_bytes
    engine = open_all(found, memory=full // 10, max_context=40, preemption=preemption)
    sampling = [short(16), short(16, n=2), short(16), short(16, n=2)]
    results = engine.generate(prompts, sampling, adapter=CHOICES[:4])
    for prompt, name, result in zip(prompts, CHOICES, results, strict=False):
        wanted = greedy(swapped(found, name), prompt, 16)
        assert [list(choice.token_ids) for choice in result.choices] == [wanted] * len(result.choices)
    assert engine.statistics().preemptions > 0


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
@pytest.mark.parametrize("weights", ["auto", "float32"])
def test_rows_leave_at_exits_with_their_own_adapters(domains, kv, weights):
    """Every second token leaves early, the same ones whatever runs beside them."""
    found, prompts = domains("exits"), make_prompts((5, 9, 17, 3, 12, 8, 5, 21))

    def replay(index: int, place: int) -> int:
        return 2 if place % 2 else 4

    given = {"weights": weights, "exits": ExitRule("top1", {}, replay), "kv": kv}
    engine = open_all(found, **given)
    answers = tokens(engine, prompts, CHOICES)
    assert set(engine.statistics().counts.depths) == {2, 4}
    for name in dict.fromkeys(CHOICES):
        alone = Engine(swapped(found, name), EngineSettings(**options(**given)))
        for prompt, choice, answer in zip(prompts, CHOICES, answers, strict=True):
            if choice == name:
                assert tokens(alone, [prompt]) == [answer]


@pytest.mark.parametrize("source", ["exit", "lookup"])
@pytest.mark.parametrize("fold", ["exits", "first keys"])
def test_drafts_change_no_token_of_any_adapters(domains, fold, source):
    found, prompts = domains(fold), make_prompts((3, 11, 20, 7))
    engine = open_all(found, drafts=Drafts(source=source, tokens=4, adapt=False))
    expected = [greedy(swapped(found, name), prompt, 12) for name, prompt in zip(CHOICES, prompts, strict=False)]
    assert tokens(engine, prompts, CHOICES[:4], short(12)) == expected


@pytest.mark.parametrize("split", ["heads", "rows"])
def test_attention_workers_keep_the_prefixes_of_all_adapters(domains, workers, split):
    found, prompts = domains("prefix"), make_prompts((5, 9, 17, 3, 12, 8, 5, 21))
    count = 2 if split == "heads" else 3
    engine = open_all(found, attention_workers=AttentionWorkers(addresses=workers.addresses[:count], split=split))
    with engine:
        expected = [greedy(swapped(found, name), prompt, 8) for name, prompt in zip(CHOICES, prompts, strict=True)]
        assert tokens(engine, prompts, CHOICES) == expected


def test_only_adapters_are_held_once_more(domains):
    found = domains("basis")
    engine = open_all(found, weights="float32")
    sizes = {name: weight.nbytes for name, weight in swapped(found, None).named_parameters()}
    each = sum(size for name, size in sizes.items() if ".lora." in name)
    report = engine.statistics()
    assert report.adapter_bytes == 3 * each
    assert engine.weights is not None
    assert report.weight_bytes == engine.weights.total + 3 * each
    assert "(3 further adapters: 0.0 MB)" in engine.describe()
    # The blocks are read at the first set alone, and none of their tensors is held.
    model = Engine(swapped(found, None), EngineSettings(**options()))
    model.add_adapters("law", found.folders["law"])
    depths = model._adapters._sets["law"].depths
    shared = {weight.data_ptr() for weight in model.model.parameters()}
    new = [weight for depth in depths for weight in depth.parameters() if weight.data_ptr() not in shared]
    assert sum(weight.nbytes for weight in new) == each == model.statistics().adapter_bytes


def test_names_and_folders_that_do_not_fit_are_refused(domains, make_source, tmp_path):
    found, other = domains("relaxed"), domains("exits")
    plain = Engine(found.base, EngineSettings(**options()), device="cpu")
    with pytest.raises(RefoldError, match=r"adapter: an engine with further adapters is required \(got 'law'\)"):
        plain.prepare([1], adapter="law")
    engine = open_all(found)
    assert engine.adapters == NAMES
    with pytest.raises(RefoldError, match=r"adapter: must be one of law, medicine, poems .*did you mean 'medicine'"):
        engine.prepare([1], adapter="medecine")
    with pytest.raises(RefoldError, match="a name that is not taken is required"):
        engine.add_adapters("law", found.folders["law"])
    with pytest.raises(RefoldError, match="a name of printable characters"):
        engine.add_adapters("a\nb", found.folders["law"])
    with pytest.raises(RefoldError, match="one for each of the 2 prompts is required"):
        engine.generate([[1], [2]], adapter=["law"])
    with pytest.raises(FolderError, match="adapters of this model's blueprint are required"):
        engine.add_adapters("new", other.folders["law"])
    changed = load_model(found.folders["law"], device="cpu")
    changed.model.norm.weight.data[0] += 1
    changed.save_pretrained(tmp_path / "changed")
    for weights, opened in (("float32", found.base), ("float32", swapped(found, None)), ("auto", swapped(found, None))):
        checked = Engine(opened, EngineSettings(**options(weights=weights)))
        with pytest.raises(FolderError, match=r"this model's blocks are required \(model.norm.weight differs\)"):
            checked.add_adapters("new", tmp_path / "changed")
        checked.add_adapters("law", found.folders["law"])
        assert checked.adapters == ("law",)
    broken = load_model(found.folders["law"], device="cpu")
    broken.model.depths[1].lora.get_parameter("q_proj.a").data[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(FolderError, match="heal the adapters again"):
        engine.add_adapters("new", tmp_path / "broken")
    with pytest.raises(RefoldError, match="a model that has some is required"):
        Engine(make_source("llama"), EngineSettings(**options()), device="cpu").add_adapters("law", found.base)
    with pytest.raises(RefoldError, match="a model that still has its blocks is required"):
        Engine(engine.model, EngineSettings(**options())).add_adapters("law", found.folders["law"])
    assert engine.adapters == NAMES


def test_thresholds_belong_to_the_weights_of_their_adapters(domains, tmp_path):
    found, prompts = domains("exits"), make_prompts((7, 9))
    own = calibrated(swapped(found, None), {0.05: None})
    files = {}
    for name, limit in (("law", 0.0), ("poems", None)):
        files[name] = calibrated(swapped(found, name), {0.05: limit}).write(tmp_path / f"{name}.json")
    engine = Engine(found.base, EngineSettings(**options(exits=own, max_pending=99)), device="cpu")
    with pytest.raises(RefoldError, match="thresholds of this model are required"):
        engine.add_adapters("medicine", found.folders["medicine"], files["law"])
    with pytest.raises(FolderError, match=r"exits\.json: a file of exit thresholds is required"):
        engine.add_adapters("medicine", found.folders["medicine"])
    gate = calibrated(swapped(found, "law"), {0.05: 0.5}, measure="gate")
    with pytest.raises(RefoldError, match=r"thresholds of the measure top1 are required, .* \(got gate\)"):
        engine.add_adapters("law", found.folders["law"], gate)
    assert engine.adapters == ()
    engine.add_adapters("law", found.folders["law"], files["law"])
    engine.add_adapters("poems", found.folders["poems"], files["poems"])
    engine.add_adapters("medicine", found.folders["medicine"], None)
    names = ("law", None, "poems", "medicine")
    results = engine.generate([prompts[0]] * 4, short(), adapter=names)
    assert [set(each.choices[0].depths) for each in results] == [{2}, {4}, {4}, {4}]
    for name, result in zip(names, results, strict=True):
        exit_depth = 2 if name == "law" else 4
        expected = greedy(swapped(found, name), prompts[0], 8, exit_depth=exit_depth)
        assert list(result.choices[0].token_ids) == expected
    with pytest.raises(RefoldError, match="exit_tolerance: calibrated exits are required"):
        engine.prepare(prompts[0], short(exit_tolerance=0.05), adapter="medicine")


def test_a_host_runs_jobs_with_their_adapters(domains):
    found, (prompt,) = domains("relaxed"), make_prompts((7,))
    told: list[WireMessage] = []
    host = EngineHost(open_all(found), told.extend)
    for number, name in enumerate(("law", "nobody", None)):
        host.receive(
            GenerationJob(id=number, prompt_ids=tuple(prompt), sampling=short(), adapter=name, wants_tokens=True)
        )
    thread = threading.Thread(target=host.run)
    thread.start()
    while len([each for each in told if isinstance(each, Ended | Refused)]) < 3:
        time.sleep(0.01)
    host.receive(StopEngine())
    thread.join()
    (facts,) = (each for each in told if isinstance(each, EngineFacts))
    assert facts.adapters == NAMES
    (refused,) = (each for each in told if isinstance(each, Refused))
    assert (refused.id, "must be one of law, medicine, poems" in refused.message) == (1, True)
    for number, name in ((0, "law"), (2, None)):
        parts = [each.token.token for each in told if isinstance(each, TextPart) and each.id == number and each.token]
        assert parts == greedy(swapped(found, name), prompt, 8)
