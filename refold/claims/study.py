"""A run of the claims: budget first, then all arms, then a verdict for each claim."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refold.checkpoint.atomic_file import require_writable, write_json, write_text
from refold.checkpoint.lock import FolderLock
from refold.checkpoint.provenance import Stage, describe_source
from refold.claims.arm_maker import MEMORY_TOKENS, ArmMaker
from refold.claims.arm_plan import CLAIMS_VERSION, ArmPlanner
from refold.claims.claim import Claim, ClaimArm, ClaimNotRun, Reading
from refold.claims.forecast import forecast_claims, measure_pace
from refold.claims.page import render_claims, require_page
from refold.claims.record import ClaimRecord, ClaimsRecord, ClaimVerdict, FindingRecord
from refold.claims.registry import CLAIMS, choose_claims
from refold.claims.scale import TINY, ClaimScale, find_scale
from refold.claims.texts import open_texts
from refold.claims.workbench import Workbench
from refold.data.corpus import Data
from refold.errors import FolderError, RefoldError, given_or_default
from refold.evaluation.evaluate import describe_machine
from refold.modeling.load import choose_device, load_tokenizer
from refold.progress import Show
from refold.sources.source_model import read_source_model
from refold.studies.shipped import held_out_data, shipped_model, training_data

RECORD_NAME = "claims.json"
SOURCE = ClaimArm("the source", {})
"""Measured beside all arms, so that readings can be seen in proportion."""


@dataclass(frozen=True)
class ClaimsSettings:
    """Settings of a run of the claims.

    Attributes:
        scale: Amounts of text, seeds, and the claims of the scale.
        only: Names of claims; they are run at any scale. Empty: all claims of the scale.
        device: Device; None: the best one.
        task_data: Folder of few-shot tasks, for claims about task scores.
        engine: JSON of `benchmarks/engine_exits.py`, for the claim about throughput.
    """

    scale: ClaimScale = TINY
    only: tuple[str, ...] = ()
    device: str | None = None
    task_data: Path | None = None
    engine: Path | None = None

    @classmethod
    def of(cls, scale: str, only: Sequence[str] | None = None, **others: Any) -> "ClaimsSettings":
        """Makes settings from the name of a scale, and checks the names of claims.

        Raises:
            RefoldError: The scale or a claim is unknown.
        """
        choose_claims(only)
        return cls(find_scale(scale), tuple(only or ()), **others)


def list_claims(scale: str) -> list[dict[str, str]]:
    """Returns name, paper and statement of every claim, and the reason why a scale does not run it."""
    found = find_scale(scale)
    return [
        {
            "name": claim.name,
            "paper": claim.paper,
            "statement": claim.statement,
            "figures": claim.figures,
            "not_run": found.skips(claim.name) or "",
        }
        for claim in CLAIMS.values()
    ]


def run_and_write(
    work: Path,
    source: str | None,
    train: Data | None,
    held_out: Data | None,
    *,
    page: Path | None,
    overwrite: bool,
    **how: Any,
) -> ClaimsRecord:
    """Runs claims as `run_claims`, and writes their page.

    Args:
        work, source, train, held_out, how: As for `run_claims`.
        page: File of the page; None: no page.
        overwrite: Replace a page that refold wrote.

    Raises:
        FolderError: The page cannot be written; checked before the run.
    """
    if page is not None:
        require_page(page, overwrite)
    found = run_claims(work, source, train, held_out, **how)
    if page is not None:
        write_text(page, render_claims(found))
    return found


def run_claims(
    work: str | Path,
    source: str | Path | None = None,
    train: Data | None = None,
    held_out: Data | None = None,
    *,
    settings: ClaimsSettings | None = None,
    show: Show | None = None,
    command: str = "",
) -> ClaimsRecord:
    """Measures claims of the papers on a source. The same call goes on after an interruption.

    Args:
        work: Folder for models and results, which later calls take over; it may be shared by scales and sources.
        source: Folder or hub id; None: the model that ships with refold, and its text.
        train: Text for training and calibration.
        held_out: Held-out text. Each of several is a domain of its own, that of the training text first.
        settings: Scale, claims and device.
        show: Shows budget and progress.
        command: Command line, recorded in the result.

    Raises:
        RefoldError: The errors of the stages, or another process uses the work folder.
    """
    settings, show = given_or_default(settings, ClaimsSettings, "settings"), show or Show()
    claims, root = choose_claims(settings.only), Path(work)
    source, train, held_out = _complete(source, train, held_out)
    model = read_source_model(source)
    _claim_folder(root)
    with FolderLock(root):
        root.mkdir(parents=True, exist_ok=True)
        started, scale = time.perf_counter(), settings.scale
        texts = open_texts(train, held_out, load_tokenizer(model.source), scale)
        planner = ArmPlanner(model, scale, texts.train.identity)
        maker = ArmMaker(planner, texts, root, settings.device, command)
        chosen = [claim for claim in claims if settings.only or scale.skips(claim.name) is None]
        bench = Workbench(
            maker, (*chosen, _source_claim()), show, {"task_data": settings.task_data, "engine": settings.engine}
        )
        device = settings.device
        with show.progress("claims: budget", "measurements") as report:
            works = bench.works(measure_pace(maker, device, report))
        show.say(forecast_claims(len(chosen), works).line)
        with show.progress("claims", "models") as report:
            bench.run(works, report)
        stage = Stage(stage="claims")
        record = ClaimsRecord(
            scale=scale.name,
            settings={**_plain(asdict(scale)), "version": CLAIMS_VERSION},
            source={"name": model.source.name, **describe_source(model.source)},
            texts=texts.names,
            claims=tuple(_judge(claim, bench, claim in chosen) for claim in claims),
            arms=bench.records(),
            source_bits={name: bench.samples(Reading(SOURCE), name).value for name in bench.domains},
            memory_tokens=MEMORY_TOKENS,
            seconds=max(bench.seconds, time.perf_counter() - started),
            machine=describe_machine(choose_device(device)),
            versions=stage.versions,
            command=command,
            time=stage.time,
        )
        write_json(root / RECORD_NAME, record.model_dump(mode="json"))
    return record


def _complete(source: str | Path | None, train: Data | None, held_out: Data | None) -> tuple[str | Path, Data, Data]:
    """Fills in the shipped model and its text."""
    if source is None:
        source = shipped_model()
        train = training_data() if train is None else train
        held_out = held_out_data() if held_out is None else held_out
    if train is None or held_out is None:
        raise RefoldError(
            f"claims: text for training and held-out text are required with a source of your own (got "
            f"{'no training text' if train is None else 'no held-out text'}); give --data and --held-out"
        )
    return source, train, held_out


def _claim_folder(root: Path) -> None:
    """Checks that a folder can be the work folder: a new one, or one of earlier claims."""
    require_writable(root.absolute())
    known = {"starts", "models", "results", RECORD_NAME}
    if root.is_dir():
        others = sorted(path.name for path in root.iterdir() if path.name not in known and path.name[0] != ".")
        if others:
            raise FolderError(
                f"{root}: a new folder, or one of earlier claims, is required (it holds {others[0]}); choose another"
            )


def _source_claim() -> Claim:
    """Returns a claim without a statement, whose only arm is the source."""
    return Claim("source", "", "", "", (_SourceReading(),))


@dataclass(frozen=True)
class _SourceReading:
    """Asks for the source's loss, and finds nothing."""

    @property
    def arms(self) -> tuple[ClaimArm, ...]:
        return (SOURCE,)

    def find(self, bench: Workbench) -> Sequence[FindingRecord]:
        return ()


def _judge(claim: Claim, bench: Workbench, is_chosen: bool) -> ClaimRecord:
    facts = {"name": claim.name, "paper": claim.paper, "statement": claim.statement, "figures": claim.figures}
    why, findings = bench.scale.skips(claim.name) if not is_chosen else bench.refused.get(claim.name), ()
    if why is None:
        try:
            findings = tuple(found for each in claim.measurements for found in each.find(bench))
        except ClaimNotRun as error:
            why = str(error)
    verdict: ClaimVerdict = "not run at this scale" if why is not None else decide_claim(findings)
    return ClaimRecord(**facts, note=claim.note, verdict=verdict, why=why or "", findings=findings)


def decide_claim(findings: Sequence[FindingRecord]) -> ClaimVerdict:
    """Returns the verdict on a claim: every comparison on every text must hold, and one that fails decides."""
    outcomes = {found.outcome for found in findings}
    if outcomes == {"holds"}:
        return "reproduced"
    return "not reproduced" if "fails" in outcomes else "undecided at this scale"


def _plain(values: dict[str, object]) -> dict[str, object]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
