"""A run of claims from start to page on a tiny model: order, caching, refusals, and going on after a kill."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from refold.checkpoint.lock import FolderLock
from refold.claims import arm_maker, study
from refold.claims.arm_plan import ArmPlanner
from refold.claims.claim import Claim, ClaimArm
from refold.claims.contrast import better
from refold.claims.forecast import ArmWork, Pace
from refold.claims.page import render_claims, require_page
from refold.claims.record import ClaimsRecord
from refold.claims.registry import CLAIMS, choose_claims
from refold.claims.scale import CLAIM_SCALES, TINY, ClaimScale, find_scale
from refold.claims.study import ClaimsSettings, run_claims
from refold.claims.texts import _distinct, open_texts
from refold.data.readers import DataSource, from_documents
from refold.errors import DataError, FolderError, HealError, RefoldError
from refold.modeling.load import load_tokenizer
from refold.progress import Show
from refold.sources.source_model import read_source_model

SCALE = replace(
    TINY,
    name="test",
    tokens=192,
    sweep_tokens=64,
    seeds=(0, 1),
    documents=12,
    validation_documents=2,
    context=16,
    batch_tokens=64,
    calibration_tokens=64,
    claims=("rrt-looping", "skip-attention"),
)
UPTRAIN = ({"objective": "next_token"},)
STRICT = ClaimArm("strict", {"fold": {"loops": 2, "init": "stepwise"}}, heal=UPTRAIN)
ALIKE = ClaimArm("strict again", {"fold": {"loops": 2, "init": "stepwise"}}, heal=UPTRAIN)
PRUNED = ClaimArm("pruned", {"drop": {"block": {"share": 0.5}}}, heal=UPTRAIN)
REMOVED = ClaimArm("removed", {"drop": {"block": {"share": 0.5}}})
UNFIT = ClaimArm("three loops", {"fold": {"loops": 3}}, heal=UPTRAIN)


def claim(name: str, *measurements: Any) -> Claim:
    return Claim(name, "a paper", "A statement.", "figures of a table", measurements)


MADE = {
    made.name: made
    for made in (
        claim("looping", better(STRICT, PRUNED)),
        claim("swapped", better(PRUNED, STRICT)),
        claim("alike", better(STRICT, ALIKE)),
        claim("unfit", better(UNFIT, STRICT)),
    )
}
SETTINGS = ClaimsSettings(replace(SCALE, claims=None), device="cpu")


@pytest.fixture(scope="module")
def tiny(make_model: Callable[..., Path]) -> Path:
    """A tiny source with a tokenizer of bytes."""
    return make_model("llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def words() -> Callable[[str], DataSource]:
    """Text of sentences that follow a rule, and text of another kind."""

    def make(kind: str) -> DataSource:
        alphabet = "abcdefghij" if kind == "home" else "klmnopqrst"
        return from_documents(
            [f"{a} goes to {b * (2 + index % 5)}." for index in range(4) for a in alphabet for b in alphabet[:3]],
            name=kind,
        )

    return make


@pytest.fixture(scope="module")
def few_rates() -> Iterator[None]:
    """One learning rate to try instead of three, because a trial takes as long as a training here."""
    patch = pytest.MonkeyPatch()
    patch.setattr(ArmPlanner, "rates", lambda self, arm: (1e-3,))
    patch.setattr(study, "CLAIMS", MADE)
    patch.setattr(
        study, "choose_claims", lambda names: tuple(each for name, each in MADE.items() if not names or name in names)
    )
    yield
    patch.undo()


@pytest.fixture(scope="module")
def found(
    tiny: Path, words: Callable[[str], DataSource], few_rates: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ClaimsRecord, Path, list[str]]:
    """All made claims, run once on two texts, with the work folder and the lines that were shown."""
    work, said = tmp_path_factory.mktemp("claims") / "work", []
    texts = [words("home"), words("away")]
    record = run_claims(work, tiny, words("home"), texts, settings=SETTINGS, show=Show(said.append))
    return record, work, said


def test_the_budget_comes_first_and_every_run_is_told(found: tuple[ClaimsRecord, Path, list[str]]) -> None:
    record, _, said = found
    assert said[0].startswith("budget: 4 claims, 3 models, 7 trainings and measurements, ")
    # Two arms with one trial and two seeds each: 2 * (64 + 2 * 192).
    assert "896 training tokens" in said[0]
    assert [line.split("]")[0] for line in said[1:]] == [f"[{number} of 7" for number in range(1, 8)]
    assert "left" in said[1]
    assert record.scale == "test"


def test_trainings_and_readings_have_paces_of_their_own(tiny: Path) -> None:
    planner = ArmPlanner(read_source_model(tiny), SCALE, "text")
    unhealed, healed = ArmWork.of(REMOVED, planner, Pace(1, 0), 100), ArmWork.of(STRICT, planner, Pace(1, 0), 100)
    # Without a training only text is read: that of a conversion, 100 test tokens and 2 validation documents.
    assert (unhealed.num_trials, unhealed.num_seeds, unhealed.tokens, unhealed.seconds) == (0, 1, 0, 0)
    share = planner.draft(REMOVED, 0).cost.target.flops(16) / planner.draft(REMOVED, 0).cost.source.flops(16)
    assert ArmWork.of(REMOVED, planner, Pace(0, 1), 100).seconds == pytest.approx(2 * 64 + share * (100 + 2 * 16))
    read = ArmWork.of(STRICT, planner, Pace(0, 1), 100)
    both = ArmWork.of(STRICT, planner, Pace(1, 1), 100)
    assert healed.full == pytest.approx(3 * 192)
    assert both.seconds == pytest.approx(healed.seconds + read.seconds)


def test_every_claim_has_its_verdict(found: tuple[ClaimsRecord, Path, list[str]]) -> None:
    by_name = {each.name: each for each in found[0].claims}
    looping, swapped = by_name["looping"].findings, by_name["swapped"].findings
    assert [each.domain for each in looping] == ["home", "away"]
    for one, other in zip(looping, swapped, strict=True):
        assert one.effect == pytest.approx(-other.effect)
        assert {one.outcome, other.outcome} in ({"holds", "fails"}, {"open"})
        assert one.low <= one.effect <= one.high
        assert (one.num_seeds, one.num_documents) == (2, 12)
        better_reading = one.readings[0].value - one.readings[1].value
        assert one.effect == pytest.approx(better_reading)
    assert by_name["alike"].verdict == "undecided at this scale"
    assert {each.effect for each in by_name["alike"].findings} == {0.0}
    assert by_name["unfit"].verdict == "not run at this scale"
    assert "fold.loops" in by_name["unfit"].why


def test_arms_of_equal_content_are_made_once(found: tuple[ClaimsRecord, Path, list[str]]) -> None:
    assert [arm.name for arm in found[0].arms] == ["pruned", "strict", "the source"]
    assert [arm.tokens for arm in found[0].arms] == [192, 192, 0]
    assert all(arm.flops <= 1.0 for arm in found[0].arms)


def test_losses_are_those_of_a_plain_loop(
    found: tuple[ClaimsRecord, Path, list[str]], tiny: Path, words: Callable[[str], DataSource]
) -> None:
    tokenizer = load_tokenizer(read_source_model(tiny).source)
    texts = open_texts(words("home"), [words("home"), words("away")], tokenizer, SETTINGS.scale)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    for domain in texts.domains:
        bits, num_bytes = 0.0, 0
        for index in range(domain.documents.num_documents):
            ids = torch.from_numpy(domain.documents.document(index).astype("int64"))[None]
            with torch.no_grad():
                chances = model(ids[:, :-1]).logits.log_softmax(-1)
            bits -= chances.gather(-1, ids[:, 1:, None]).sum().item() / math.log(2)
            num_bytes += len(str(tokenizer.decode(ids[0, 1:])).encode())
        assert found[0].source_bits[domain.name] == pytest.approx(bits / num_bytes, rel=1e-5)


def test_a_second_run_takes_everything_over(
    found: tuple[ClaimsRecord, Path, list[str]],
    tiny: Path,
    words: Callable[[str], DataSource],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record, work, _ = found
    monkeypatch.setattr(arm_maker, "heal", None)
    monkeypatch.setattr(arm_maker, "carry_out", None)
    texts = [words("home"), words("away")]
    again = run_claims(work, tiny, words("home"), texts, settings=replace(SETTINGS, only=("looping", "alike")))
    assert ClaimsRecord.model_validate_json((work / "claims.json").read_text()) == again
    assert again.claims == tuple(each for each in record.claims if each.name in ("looping", "alike"))
    # Other test documents are another measurement, which needs the models.
    with pytest.raises(TypeError):
        run_claims(work, tiny, words("home"), [words("away")], settings=replace(SETTINGS, only=("looping",)))


def test_the_page_has_statement_figures_and_verdict(found: tuple[ClaimsRecord, Path, list[str]]) -> None:
    page = render_claims(found[0])
    assert page.startswith("# The papers' claims, measured (test)")
    assert "**Undecided at this scale**." in page
    assert "A statement." in page
    assert "a paper: figures of a table." in page
    assert "| strict better than pruned | away |" in page
    assert "not run at this scale**: " in page
    diverged = found[0].arms[0].model_copy(update={"rates": {"0.1": None, "0.001": 2.0}, "is_edge": True})
    assert "| 0.001* | 0.1: diverged, 0.001: 2.0000 |" in render_claims(
        found[0].model_copy(update={"arms": (diverged,)})
    )


def test_a_rate_at_which_training_diverges_is_never_the_best(
    tiny: Path, words: Callable[[str], DataSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise HealError("the loss is not finite")

    monkeypatch.setattr(arm_maker, "heal", diverge)
    model = read_source_model(tiny)
    texts = open_texts(words("home"), words("home"), load_tokenizer(model.source), SETTINGS.scale)
    planner = ArmPlanner(model, SETTINGS.scale, texts.train.identity)
    maker = arm_maker.ArmMaker(planner, texts, tmp_path, "cpu", "")
    run = arm_maker.ArmRun(STRICT, 0, 0.1, 64, is_trial=True)
    assert maker.make(run, [], keep=False).validation == math.inf
    assert maker.find(run, []) == maker.make(run, [], keep=False)
    with pytest.raises(HealError, match="not finite"):
        maker.make(replace(run, is_trial=False), [], keep=False)


def test_a_work_folder_has_one_user(found: tuple[ClaimsRecord, Path, list[str]], tiny: Path) -> None:
    _, work, _ = found
    with FolderLock(work), pytest.raises(FolderError, match="one writer at a time is required"):
        run_claims(work, tiny, from_documents(["a b"]), from_documents(["a b"]), settings=SETTINGS)


def test_other_folders_and_files_are_left_alone(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    text = from_documents(["a b"])
    with pytest.raises(FolderError, match=r"one of earlier claims, is required \(it holds thesis.txt\)"):
        run_claims(tmp_path, tiny, text, text, settings=SETTINGS)
    with pytest.raises(FolderError, match="a page of `claims` is required to be overwritten"):
        require_page(tmp_path / "thesis.txt", overwrite=True)


def test_mistakes_are_told(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RefoldError, match="scale: must be one of tiny, small, gpu"):
        find_scale("huge")
    with pytest.raises(RefoldError, match=r"only: must be one of .*did you mean 'rrt-looping'"):
        choose_claims(["rrt-loping"])
    with pytest.raises(RefoldError, match="got no training text"):
        run_claims(tmp_path / "work", tiny, settings=SETTINGS)
    few = from_documents(["a b c", "d e f"])
    with pytest.raises(DataError, match=r"at least 8 held-out documents .*got 1"):
        run_claims(tmp_path / "work", tiny, few, few, settings=SETTINGS)


def test_validation_documents_are_no_test_documents(tiny: Path) -> None:
    source = from_documents([f"{a}{b}{c}" for a in "abcdef" for b in "ghij" for c in "klmno"])
    tokenizer = load_tokenizer(read_source_model(tiny).source)
    texts = open_texts(source, source, tokenizer, replace(SETTINGS.scale, documents=30, validation_documents=10))
    test = {bytes(_document(texts.domains[0], index)) for index in range(30)}
    validation = {bytes(_document(texts.validation, index)) for index in range(10)}
    assert len(test) == 30
    assert len(validation) == 10
    assert not test & validation


def _document(domain: Any, index: int) -> bytes:
    return domain.documents.document(index).tobytes()


@pytest.mark.parametrize("name", CLAIM_SCALES)
def test_every_scale_runs_claims_that_there_are(name: str) -> None:
    scale: ClaimScale = CLAIM_SCALES[name]
    assert set(scale.claims or ()) <= CLAIMS.keys()
    assert len(scale.seeds) >= 3
    skipped = [claim for claim in CLAIMS if scale.skips(claim)]
    assert len(skipped) == (len(CLAIMS) - 8 if name == "tiny" else 0)


@pytest.mark.long
def test_a_killed_run_goes_on_to_the_same_figures(tmp_path: Path) -> None:
    code = (
        "import sys; from dataclasses import replace; from pathlib import Path\n"
        "from refold.claims.arm_maker import CHECKPOINT_SECONDS; import refold.claims.arm_maker as m\n"
        "m.CHECKPOINT_SECONDS = 0.1\n"
        "from refold.claims.scale import TINY; from refold.claims.study import ClaimsSettings, run_claims\n"
        "from refold.progress import Show\n"
        "s = replace(TINY, tokens=8192, sweep_tokens=256, seeds=(0,), documents=12, validation_documents=2,\n"
        "            context=64, batch_tokens=256)\n"
        "run_claims(Path(sys.argv[1]), settings=ClaimsSettings(s, only=('rrt-looping',), device='cpu'),\n"
        "           show=Show(lambda line: print(line, flush=True)))\n"
    )

    def start(work: Path) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code, str(work)], stdout=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    assert whole.wait(timeout=600) == 0
    for _ in range(3):
        killed = start(tmp_path / "killed")
        deadline = time.monotonic() + 300
        while killed.poll() is None and time.monotonic() < deadline:
            if list((tmp_path / "killed").glob("models/.*.heal/checkpoints/*")):
                time.sleep(0.5)
                os.kill(killed.pid, signal.SIGKILL)
                break
            time.sleep(0.1)
        killed.wait(timeout=60)
    last = start(tmp_path / "killed")
    assert last.wait(timeout=600) == 0
    one, other = (
        ClaimsRecord.model_validate_json((tmp_path / name / "claims.json").read_text()) for name in ("whole", "killed")
    )
    assert one.claims == other.claims
    assert one.source_bits == other.source_bits


def test_texts_of_another_name_take_over_the_results(
    found: tuple[ClaimsRecord, Path, list[str]], tiny: Path, words: Callable[[str], DataSource], few_rates: None
) -> None:
    record, work, _ = found
    said: list[str] = []
    renamed = [from_documents(words(kind).documents(), name=f"{kind} again") for kind in ("home", "away")]
    again = run_claims(work, tiny, words("home"), renamed, settings=SETTINGS, show=Show(said.append))
    assert len(said) == 1
    first, second = record.claims[0].findings, again.claims[0].findings
    assert [each.domain for each in second] == ["home again", "away again"]
    assert [each.effect for each in second] == [each.effect for each in first]


def test_files_of_one_name_are_named_by_their_folders() -> None:
    assert _distinct(["a/x.parquet", "a/y.parquet"]) == ["x.parquet", "y.parquet"]
    assert _distinct(["t/a/x.parquet", "t/b/x.parquet"]) == ["a/x.parquet", "b/x.parquet"]
    assert _distinct(["x", "x"]) == ["x (1)", "x (2)"]


def test_a_text_that_the_source_hardly_knows_is_named(found: tuple[ClaimsRecord, Path, list[str]]) -> None:
    strange = found[0].model_copy(update={"source_bits": {"home": 1.0, "away": 2.5}})
    known = found[0].model_copy(update={"source_bits": {"home": 1.0, "away": 1.5}})
    assert "The source can hardly predict away. " in render_claims(strange)
    assert "hardly predict" not in render_claims(known)
