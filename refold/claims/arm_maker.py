"""The maker of arms: converts, trains and measures one model at a time, and keeps results by content."""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refold.checkpoint.atomic_file import write_json
from refold.claims.arm_plan import ArmPlanner
from refold.claims.claim import ClaimArm
from refold.claims.texts import ClaimTexts, Domain, digest_of
from refold.conversion.convert import ConvertOptions, carry_out
from refold.conversion.measured import reads_text
from refold.errors import HealError
from refold.evaluation.subject import Subject, open_subject
from refold.evaluation.window_pass import Stopwatch, WindowPass
from refold.healing.heal import heal
from refold.healing.interruption import HealInterrupted
from refold.healing.log import LOG_NAME
from refold.healing.run import HealOptions
from refold.planning.plan import Draft
from refold.studies.arm import is_finished

CHECKPOINT_SECONDS = 60.0
MEMORY_TOKENS = 8192
"""Tokens of the sequence whose cache is counted."""
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class ArmRun:
    """One training of an arm.

    Attributes:
        arm: The arm.
        seed: Seed of fresh weights and of the order of the data.
        rate: Peak learning rate; None: no training.
        tokens: Training tokens.
        is_trial: Whether it only tries a learning rate.
    """

    arm: ClaimArm
    seed: int
    rate: float | None
    tokens: int
    is_trial: bool = False


@dataclass(frozen=True)
class ArmResult:
    """The figures of one model.

    Attributes:
        bits: For each domain the bits of each test document at full depth; of a trial none.
        exit_bits: For each domain the bits at each exit.
        validation: Bits per byte on validation text; infinite if training diverged.
        curve: Pairs of tokens and validation bits per byte during training.
        seconds: Time of conversion, training and measurement.
    """

    bits: dict[str, list[float]]
    exit_bits: dict[str, list[list[float]]]
    validation: float
    curve: list[tuple[int, float]]
    seconds: float


class ArmMaker:
    """Makes and measures arms in a work folder, and reuses the results that the folder has.

    Args:
        planner: Plans of the arms.
        texts: Texts of the run.
        work: The work folder.
        device: Device for training and measuring; None: the best one.
        command: Command line, for the provenance.
    """

    def __init__(self, planner: ArmPlanner, texts: ClaimTexts, work: Path, device: str | None, command: str):
        self.planner, self.texts, self.work = planner, texts, work
        self._device, self._command = device, command

    def run_key(self, run: ArmRun, base_rates: Sequence[float]) -> str:
        """Returns the key of a training: its start, or the training of its base, and its stages.

        Args:
            run: The training.
            base_rates: The chosen learning rates of the arm's bases, first to last.
        """
        arm, planner = run.arm, self.planner
        if arm.base is None:
            start = planner.start_key(planner.draft(arm, run.seed))
        else:
            start = self.run_key(self._base_run(arm.base, run.seed, base_rates), base_rates[:-1])
        if run.rate is None:
            return start
        stages = planner.stages(arm, run.rate, run.seed, run.tokens)
        plain = [stage.model_dump(mode="json", exclude_unset=True) for stage in stages]
        return digest_of(start, plain, planner.train, run.is_trial, arm.is_followed)

    def find(self, run: ArmRun, base_rates: Sequence[float]) -> ArmResult | None:
        """Returns the result of an earlier training; None if there is none."""
        path = self._result_path(self.run_key(run, base_rates))
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        found["validation"] = math.inf if found["validation"] is None else found["validation"]
        for field in ("bits", "exit_bits"):
            # The same documents may have another name by now.
            names = [domain.name for domain in self.texts.domains]
            found[field] = dict(zip(names, found[field].values(), strict=False))
        return ArmResult(**{**found, "curve": [tuple(point) for point in found["curve"]]})

    def make(self, run: ArmRun, base_rates: Sequence[float], *, keep: bool) -> ArmResult:
        """Trains and measures an arm, unless its result exists.

        Args:
            run: The training.
            base_rates: The chosen learning rates of the arm's bases, first to last.
            keep: Keep the trained model, because another arm goes on from it.

        Raises:
            HealInterrupted: The process was asked to end; the same call goes on from a checkpoint.
            RefoldError: The errors of the stages.
        """
        key = self.run_key(run, base_rates)
        found = self.find(run, base_rates)
        if found is not None:
            return found
        started, curve = time.perf_counter(), []
        try:
            folder, curve = self._model(run, base_rates)
            result = self._measure(folder, run.is_trial, curve, started)
        except HealInterrupted:
            raise
        except HealError:
            # A learning rate at which training diverges is never the best one.
            if not run.is_trial:
                raise
            result = ArmResult({}, {}, math.inf, [], time.perf_counter() - started)
        write_json(self._result_path(key), {**vars(result), "validation": _finite(result.validation)})
        if run.rate is not None and not keep:
            _remove(self.work / "models" / key)
        return result

    def forget_start(self, arm: ClaimArm, seeds: Sequence[int]) -> None:
        """Removes the conversions of an arm, whose models are all trained."""
        for seed in seeds if arm.base is None else ():
            _remove(self._start_folder(self.planner.draft(arm, seed)))

    def costs(self, arm: ClaimArm) -> dict[str, Any]:
        """Returns parameters, bytes and FLOPs of an arm that was made."""
        root = (*arm.bases, arm)[0]
        path = self._start_folder(self.planner.draft(root, self.planner.scale.seeds[0])).with_suffix(".json")
        return json.loads(path.read_text(encoding="utf-8"))

    def folder(self, run: ArmRun, base_rates: Sequence[float]) -> Path:
        """Returns the folder of a model, which is made if it is not there."""
        return self._model(run, base_rates)[0]

    def bits(self, subject: Subject, domain: Domain) -> tuple[list[float], list[list[float]]]:
        """Returns the bits of every document at full depth and at each exit."""
        context, documents = self.planner.scale.context, domain.documents
        scored = WindowPass(subject.model, None, documents.num_documents, Stopwatch())
        scored.run(documents, context, context, max(1, BATCH_TOKENS // context), None)
        exits = [(sums.nll / math.log(2)).tolist() for sums in scored.exit_sums]
        return (scored.sums.nll / math.log(2)).tolist(), exits

    def _base_run(self, base: ClaimArm, seed: int, rates: Sequence[float]) -> ArmRun:
        return ArmRun(base, seed, rates[-1] if base.heal else None, self.planner.tokens(base))

    def _model(self, run: ArmRun, base_rates: Sequence[float]) -> tuple[Path, list[tuple[int, float]]]:
        """Returns the folder of a model and its curve; an unfinished training goes on."""
        arm = run.arm
        if arm.base is None:
            start = self._convert(self.planner.draft(arm, run.seed))
        else:
            start = self._model(self._base_run(arm.base, run.seed, base_rates), base_rates[:-1])[0]
        if run.rate is None:
            return start, []
        target = self.work / "models" / self.run_key(run, base_rates)
        if not is_finished(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            follows = arm.is_followed and not run.is_trial
            heal(
                start,
                target,
                self.texts.train,
                self.planner.stages(arm, run.rate, run.seed, run.tokens),
                held_out=self.texts.validation_text if follows else None,
                options=HealOptions(
                    device=self._device, quiet=True, checkpoint_seconds=CHECKPOINT_SECONDS, command=self._command
                ),
            )
        return target, _curve(target)

    def _convert(self, draft: Draft) -> Path:
        target = self._start_folder(draft)
        if not is_finished(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            text = self.texts.train if reads_text(draft) else None
            options = ConvertOptions(command=self._command)
            plan = carry_out(draft, self.planner.model.source, target, options, calibration=text)
            costs = plan.cost.target
            write_json(
                target.with_suffix(".json"),
                {
                    "parameters": costs.non_embedding_parameters,
                    "weight_bytes": costs.weight_bytes,
                    "memory_bytes": costs.memory_bytes(MEMORY_TOKENS),
                    "flops": costs.flops(self.planner.scale.context)
                    / plan.cost.source.flops(self.planner.scale.context),
                },
            )
        return target

    def _measure(self, folder: Path, is_trial: bool, curve: list[tuple[int, float]], started: float) -> ArmResult:
        subject = open_subject(folder, device=self._device)
        bits, exit_bits = {}, {}
        for domain in () if is_trial else self.texts.domains:
            bits[domain.name], exit_bits[domain.name] = self.bits(subject, domain)
        validation = self.texts.validation
        total = sum(self.bits(subject, validation)[0]) / int(validation.sizes.sum())
        return ArmResult(bits, exit_bits, total, curve, time.perf_counter() - started)

    def _start_folder(self, draft: Draft) -> Path:
        return self.work / "starts" / self.planner.start_key(draft)

    def _result_path(self, key: str) -> Path:
        return self.work / "results" / f"{key}-{self.texts.identity[:16]}.json"


def _curve(model: Path) -> list[tuple[int, float]]:
    """Returns tokens and validation bits per byte of a trained model, by its log."""
    lines = [json.loads(line) for line in (model / LOG_NAME).read_text(encoding="utf-8").splitlines()]
    return [(line["tokens"], line["held_out"]) for line in lines if line.get("held_out") is not None]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
