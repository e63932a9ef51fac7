"""Starts and their rivals on real models: unhealed losses on several kinds of text, tasks, and healed arms.

    python benchmarks/real_models.py measure --name smollm2 --source MODEL --work runs/real
    python benchmarks/real_models.py identity --name smollm2 --source MODEL --work runs/real
    python benchmarks/real_models.py tasks --name smollm2 --source MODEL --task-data FOLDER --work runs/real
    python benchmarks/real_models.py heal --name smollm2 --source MODEL --tokens 300k --work runs/real
    python benchmarks/real_models.py write --work runs/real --write docs/results/real-models.md

Every figure is a file under `--work`, and healing goes on from its last checkpoint, so an interrupted command continues
when it is given again; `heal --minutes 9` ends after so many by itself, in the midst of an arm too.

`--known docs/results/real-models.json` begins with the figures of the page. `measure` converts each arm of
`benchmarks/starts.py` at each share, once with moments of the first calibration text and once with those of all of them
together. Run it from a folder in which the paths are short: they are written into the page.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from real_models_files import keep, keep_facts, slug, unpack
from real_models_options import arguments
from real_models_page import render
from starts import ARMS, count_bytes
from transformers import AutoModelForCausalLM

from refold.blueprint.schema import Blueprint
from refold.conversion.convert import carry_out
from refold.conversion.measured import keep_moments
from refold.data.corpus import open_text
from refold.data.readers import DataSource, from_documents
from refold.errors import RecipeError
from refold.evaluation.evaluate import evaluate
from refold.evaluation.reference import Reference
from refold.evaluation.result import Evaluation
from refold.evaluation.settings import EvaluationSettings
from refold.healing.heal import heal
from refold.healing.interruption import HealInterrupted, Stopped, stop_on_signals
from refold.healing.run import HealOptions
from refold.modeling.configuration import RefoldConfig
from refold.modeling.load import load_model, load_tokenizer
from refold.planning.build import identity_blueprint
from refold.planning.factors import stored_share
from refold.planning.plan import plan_model
from refold.recipe.heal import HealStage
from refold.recipe.load import load_recipe
from refold.scorecard.score import score
from refold.scorecard.settings import ScoreSettings
from refold.sources.source_model import read_source_model

SCHEMES = ("int8", "int4")
MIXED = "all"
"""Name of the calibration text that mixes all kinds in equal parts."""


@dataclass(frozen=True)
class RealModel:
    """One source with the state that all commands share."""

    given: argparse.Namespace
    started: float = field(default_factory=time.perf_counter)

    @property
    def folder(self) -> Path:
        return self.given.work / self.given.name

    @property
    def seconds_left(self) -> float:
        return 60 * self.given.minutes - (time.perf_counter() - self.started)

    @property
    def has_time(self) -> bool:
        return self.seconds_left > 0

    @cached_property
    def model(self) -> Any:
        return read_source_model(self.given.source)

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.given.source, dtype=self.given.dtype, device=self.given.device, remember=4 * 2**30)

    @property
    def calibrations(self) -> list[str]:
        return self.given.calibration or [next(iter(self.given.train)), MIXED]

    def text(self, kind: str) -> DataSource:
        """Returns the calibration text of one kind, or the mixture of all in equal parts."""
        texts = self.given.train
        return open_mixture(texts.values() if kind == MIXED else [texts[kind]])

    def moments(self, kind: str) -> Path:
        """Measures the moments of a calibration text once."""
        given, folder = self.given, self.folder / f"moments-{kind}"
        if not (folder / "moments.json").exists():
            begun = time.perf_counter()
            shutil.rmtree(folder, ignore_errors=True)
            calibration = {"tokens": given.moment_tokens, "context": given.context}
            keep_moments(
                given.source,
                {"factor": {"parameters": 0.5, "weight": "fisher"}, "calibration": calibration},
                self.text(kind),
                folder,
            )
            print(f"moments of {kind}: {time.perf_counter() - begun:.0f} s", flush=True)
        return folder

    def evaluate(self, model: str | Path, scheme: str | None = None) -> Evaluation:
        given = self.given
        settings = EvaluationSettings(context=given.context, dtype=given.dtype, device=given.device, quantise=scheme)
        return evaluate(model, self.held_out, settings, against=self.reference)

    @cached_property
    def held_out(self) -> list[DataSource]:
        """The first characters of documents that are spread evenly over each file; a file that is one text is cut."""
        given, found = self.given, []
        for kind, text in given.held_out.items():
            whole = [each for each in open_text([text]).documents() if len(each) >= given.characters]
            if len(whole) < given.documents:
                whole = paragraphs("\n\n".join(whole), given.documents)
            step = max(1, len(whole) // given.documents)
            pieces = [each[: given.characters] for each in whole[::step][: given.documents]]
            found.append(from_documents(pieces, name=kind))
        return found

    def arms(self) -> Iterator[tuple[str, float, str, dict[str, Any]]]:
        """Yields arm, share, calibration text and recipe; arms that read no text come once."""
        for share in self.given.shares:
            for name in self.given.arms:
                recipe = ARMS[name].recipe(share, self.model)
                if recipe is None:
                    continue
                try:
                    needs = reads_text(self.model, recipe)
                except RecipeError as error:
                    print(f"{name} at {share:g}: {error}", flush=True)
                    continue
                for kind in self.calibrations if needs else ["none"]:
                    yield name, share, kind, recipe

    def target(self, name: str, share: float, kind: str) -> Path:
        return self.folder / "targets" / f"{slug(name)}-{share:g}-{kind}"

    def convert(self, name: str, share: float, kind: str, recipe: dict[str, Any]) -> Path | None:
        """Converts one target, unless it is there; returns None if the recipe does not fit."""
        given, out = self.given, self.target(name, share, kind)
        if out.exists():
            return out
        sizes = {"tokens": given.moment_tokens, "context": given.context}
        try:
            settings = {**recipe, "calibration": {**recipe.get("calibration", {}), **sizes}}
            plan = plan_model(self.model, load_recipe(settings), allow_larger=True)
            reads = plan.recipe.measures_influence or plan.recipe.fits_in_sequence or plan.recipe.replaces
            moments = self.moments(kind) if plan.recipe.needs_text else None
            out.parent.mkdir(parents=True, exist_ok=True)
            carry_out(plan, self.model.source, out, calibration=self.text(kind) if reads else None, moments=moments)
        except RecipeError as error:
            print(f"{name} at {share:g}: {error}", flush=True)
            return None
        return out

    def row(self, found: Evaluation, blueprint: Blueprint, scheme: str | None, **more: Any) -> dict[str, Any]:
        source = identity_blueprint(blueprint.arch)
        compared = found.against
        assert compared is not None
        kinds = {
            kind.name: {
                "bits_per_byte": kind.bits_per_byte,
                "difference": kind.difference,
                "error": kind.difference_error,
                "nats": (kind.difference or 0.0) * math.log(2) * kind.bytes / kind.tokens,
                "perplexity": kind.perplexity,
                "agreement": kind.agreement,
                "kl": kind.kl,
            }
            for kind in found.kinds
        }
        return {
            "share": stored_share(blueprint, source),
            "bytes": count_bytes(blueprint, scheme) / count_bytes(source, None),
            "kinds": kinds,
            **more,
        }


def reads_text(model: Any, recipe: dict[str, Any]) -> bool:
    """Returns whether a conversion by the recipe reads text or moments of it."""
    plan = plan_model(model, load_recipe(recipe), allow_larger=True)
    made = plan.recipe
    return bool(made.needs_text or made.measures_influence or made.fits_in_sequence or made.replaces)


def open_mixture(texts: Collection[str]) -> DataSource:
    """Opens texts in equal parts."""
    return open_text([f"{text}={1 / len(texts):.6f}" for text in texts] if len(texts) > 1 else list(texts))


def paragraphs(text: str, count: int) -> list[str]:
    """Returns a text from `count` evenly spaced paragraphs on."""
    starts = [text.find("\n\n", place) + 2 for place in range(0, len(text), len(text) // (count + 1))]
    return [text[start:] for start in starts[:count]]


def measure(study: RealModel) -> None:
    """Measures the source in integers, and every arm at every share."""
    place = study.folder / "rows"
    blueprint = identity_blueprint(study.model.arch)
    for scheme in SCHEMES:
        path = place / f"source-{scheme}.json"
        if not path.exists():
            row = study.row(study.evaluate(study.given.source, scheme), blueprint, scheme)
            keep(path, {"arm": f"the source in {scheme}", "asked": 1.0, "calibration": "none", **row})
    for name, share, kind, recipe in study.arms():
        path = place / f"{slug(name)}-{share:g}-{kind}.json"
        if path.exists() or not study.has_time:
            continue
        begun = time.perf_counter()
        out = study.convert(name, share, kind, recipe)
        if out is None:
            continue
        converted = time.perf_counter() - begun
        found = study.evaluate(out)
        blueprint = RefoldConfig.from_pretrained(out).read_blueprint()
        row = study.row(found, blueprint, None, seconds={"convert": round(converted), "all": 0})
        row["seconds"]["all"] = round(time.perf_counter() - begun)
        keep(path, {"arm": name, "asked": share, "calibration": kind, **row})
        losses = {each: round(value["nats"], 3) for each, value in row["kinds"].items()}
        print(f"{name} at {share:g}, {kind}: {losses} {row['seconds']}", flush=True)


def check_identity(study: RealModel) -> None:
    """Compares the source's identity fold with transformers: logits in float32, greedy tokens, and a chat."""
    out = study.folder / "targets" / "identity"
    if not out.exists():
        plan = plan_model(study.model, load_recipe({}), allow_larger=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        carry_out(plan, study.model.source, out)
    theirs = AutoModelForCausalLM.from_pretrained(study.given.source, dtype=torch.float32).eval()
    ours = load_model(out, dtype="float32").eval()
    tokenizer = load_tokenizer(out)
    largest, scale, prompts = 0.0, 0.0, [each for text in study.held_out for each in text.documents()]
    for text in prompts[::6]:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : study.given.context]
        with torch.inference_mode():
            expected, found = theirs(ids).logits, ours(ids).logits
        largest, scale = max(largest, float((expected - found).abs().max())), max(scale, float(expected.abs().max()))
    same = {}
    ids = tokenizer(prompts[0][:300], return_tensors="pt").input_ids
    same["greedy"] = greedy(theirs, ids) == greedy(ours, ids)
    answer = None
    if tokenizer.chat_template is not None:
        asked = [{"role": "user", "content": "What is the capital of France?"}]
        shown: Any = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        expected = greedy(theirs, shown["input_ids"])
        same["chat"] = expected == greedy(ours, shown["input_ids"])
        answer = tokenizer.decode(expected, skip_special_tokens=True)
    row = {"largest_difference": largest, "largest_logit": scale, "same": same, "answer": answer}
    keep(study.folder / "identity.json", row)
    print(row, flush=True)


def greedy(model: Any, ids: torch.Tensor) -> list[int]:
    """Returns 64 greedy tokens after a prompt."""
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
    return made[0, ids.shape[1] :].tolist()


def heal_arms(study: RealModel) -> None:
    """Heals each arm on a mixture in equal parts, and measures it; an interrupted run goes on."""
    given = study.given
    texts = given.heal_on or given.train
    kinds = "+".join(texts)
    stage = HealStage(
        tokens=given.tokens, learning_rate=given.rate, batch_tokens=given.batch_tokens, context=given.context
    )
    for name, share, kind, recipe in study.arms():
        run = f"{slug(name)}-{share:g}-{kind}-{given.tokens}-{given.rate:g}-{kinds}"
        path = study.folder / "healed" / f"{run}.json"
        start = None if path.exists() or not study.has_time else study.convert(name, share, kind, recipe)
        if start is None:
            continue
        begun, out = time.perf_counter(), path.with_suffix("")
        if not out.exists():
            options = HealOptions(device=given.device, checkpoint_seconds=120.0)
            try:
                with stopping_after(max(0.0, study.seconds_left)):
                    heal(start, out, open_mixture(texts.values()), [stage], options=options)
            except (HealInterrupted, Stopped):
                if study.has_time:
                    raise
                print(f"{name}: {given.minutes:g} minutes are over; the same command goes on", flush=True)
                return
        row = study.row(study.evaluate(out), RefoldConfig.from_pretrained(out).read_blueprint(), None)
        more = {"tokens": given.tokens, "batch_tokens": given.batch_tokens, "rate": given.rate}
        more |= {"seconds": round(time.perf_counter() - begun), "healed_on": kinds}
        keep(path, {"arm": name, "asked": share, "calibration": kind, **row, **more})
        print(f"{name} at {share:g}, {kind}, healed: {row['kinds']}", flush=True)


@contextmanager
def stopping_after(seconds: float) -> Iterator[None]:
    """Sends this process SIGTERM after some seconds of the body: healing writes a checkpoint then, and raises."""
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    with stop_on_signals():
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def score_tasks(study: RealModel) -> None:
    """Scores the source, the source in integers, each arm, and each that is healed, on the seven tasks."""
    given = study.given
    settings = ScoreSettings(
        text=EvaluationSettings(dtype=given.dtype, device=given.device),
        tasks=("seven",),
        task_data=given.task_data,
        limit=given.limit,
    )
    place = study.folder / f"tasks-{given.limit}"
    wanted: list[tuple[str, dict[str, Any], Path | str | None, str | None]] = [
        ("source", {"arm": "the source", "asked": 1.0, "calibration": "none"}, given.source, None)
    ]
    for scheme in SCHEMES:
        facts = {"arm": f"the source in {scheme}", "asked": 1.0, "calibration": "none"}
        wanted.append((f"source-{scheme}", facts, given.source, scheme))
    for name, share, kind, recipe in study.arms():
        facts = {"arm": name, "asked": share, "calibration": kind}
        wanted.append((f"{slug(name)}-{share:g}-{kind}", facts, study.convert(name, share, kind, recipe), None))
        for healed in sorted((study.folder / "healed").glob(f"{slug(name)}-{share:g}-{kind}-*.json")):
            if (folder := healed.with_suffix("")).is_dir():
                row = json.loads(healed.read_text())
                more = {name: row[name] for name in ("tokens", "rate", "healed_on")}
                wanted.append((healed.stem, {**facts, **more}, folder, None))
    for key, facts, model, scheme in wanted:
        path = place / f"{key}.json"
        if model is None or path.exists() or not study.has_time:
            continue
        begun = time.perf_counter()
        (card,) = score([model], None, replace(settings, text=replace(settings.text, quantise=scheme)))
        keep(path, {**facts, "seconds": round(time.perf_counter() - begun), **card.model_dump(mode="json")})
        assert card.tasks is not None
        print(f"{key}: {card.tasks.average:.4f}, {time.perf_counter() - begun:.0f} s", flush=True)


def main() -> int:
    given = arguments(__doc__)
    if given.known is not None:
        unpack(given.known, given.work)
    if given.command == "write":
        return render(given.work, given.write)
    study = RealModel(given)
    study.folder.mkdir(parents=True, exist_ok=True)
    keep_facts(study.folder, given.command)
    {"identity": check_identity, "measure": measure, "tasks": score_tasks, "heal": heal_arms}[given.command](study)
    return 0


if __name__ == "__main__":
    sys.exit(main())
