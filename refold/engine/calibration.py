"""Calibration of early exits: thresholds that keep the likeliest token of the full depth for nearly all tokens."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from typing import NamedTuple, cast

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refold.blueprint.passes import last_writing_depth
from refold.data.corpus import Data, open_text
from refold.data.encoder import TextEncoder
from refold.data.mixture import Interleave, MixedSource
from refold.data.readers import DataSource
from refold.data.tokens import require_known_tokens
from refold.engine.confidence import MEASURES, Measure, compares_exits, reads_gate
from refold.engine.exit_table import DocumentProgress, Documents, fill_table
from refold.engine.live_check import EngineRunner, LiveCheck, LiveRunner
from refold.engine.search import ExactSearch, Places, Promise, SkippingSearch, ThresholdSearch
from refold.engine.settings import KV_POLICIES, KvPolicy
from refold.engine.thresholds import LiveShares, Thresholds, ToleranceLevel, model_fingerprint
from refold.errors import DataError, RefoldError, given_or_default
from refold.evaluation.subject import open_subject, require_tokenizer
from refold.modeling.load import ModelLike
from refold.modeling.model import RefoldForCausalLM
from refold.suggest import must_be_one_of

DEFAULT_DOCUMENTS = 1000
DEFAULT_CONTEXT = 512
MAX_TOLERANCES = 16
_ENCODED_AT_ONCE = 64
_LIVE_SHARE = 5
"""At most one document in so many is kept for the live check."""


@dataclass(frozen=True)
class CalibrateOptions:
    """Settings of one calibration.

    Attributes:
        tolerance: Largest share of tokens that may differ from the full depth's, as a mean over documents; taken where
            a request asks for none.
        confidence: Probability with which each tolerance is kept.
        measure: Measure of confidence; None: `gate` if every exit has one, else `top1`.
        kv: Keys and values of skipped depths in serving; None: `shared` if the stack allows it, else `recompute`.
        documents: Most documents to read, those of the live check not counted.
        tokens: Most tokens to read; None: no limit.
        context: Tokens to read of each document; None: 512, at most the model's positions.
        live_documents: Documents for the check in generation; 0: no check.
        live_tokens: New tokens of each.
        seed: Seed of the order of documents.
        dtype: Dtype of the weights; None: as stored, or float32 where that is slow.
        device: Device of the model; None: the best one there is.
        further_tolerances: Tolerances that requests may ask for beside it.

    Raises:
        RefoldError: A setting is out of range.
    """

    tolerance: float = 0.01
    confidence: float = 0.95
    measure: str | None = None
    kv: str | None = None
    documents: int = DEFAULT_DOCUMENTS
    tokens: int | None = None
    context: int | None = None
    live_documents: int = 64
    live_tokens: int = 64
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    further_tolerances: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        values = [("confidence", self.confidence), *(("tolerance", each) for each in self.tolerances)]
        for name, value in values:
            if not 0 < value < 1:
                raise RefoldError(f"{name}: must lie between 0 and 1, both excluded (got {value:g})")
        if len(self.tolerances) > MAX_TOLERANCES:
            raise RefoldError(f"tolerance: at most {MAX_TOLERANCES} are allowed (got {len(self.tolerances)})")
        if self.measure is not None and self.measure not in MEASURES:
            raise RefoldError(f"measure: {must_be_one_of(self.measure, MEASURES)}")
        if self.kv is not None and self.kv not in KV_POLICIES:
            raise RefoldError(f"kv: {must_be_one_of(self.kv, KV_POLICIES)}")
        least = {"documents": 1, "tokens": 1, "context": 2, "live_documents": 0, "live_tokens": 1}
        for name, at_least in least.items():
            value = getattr(self, name)
            if value is not None and value < at_least:
                raise RefoldError(f"{name}: at least {at_least} is required (got {value})")

    @property
    def tolerances(self) -> tuple[float, ...]:
        """All tolerances, smallest first."""
        return tuple(sorted({self.tolerance, *self.further_tolerances}))


class Calibrated(NamedTuple):
    """The result of a calibration.

    Attributes:
        thresholds: The thresholds.
        notes: Sentences about exits at which no token may leave, about thresholds that the live check tightened, and
            about text of one kind.
    """

    thresholds: Thresholds
    notes: tuple[str, ...]


def calibrate(
    model: ModelLike,
    data: Data,
    options: CalibrateOptions | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    make_runner: Callable[[RefoldForCausalLM], LiveRunner] = EngineRunner,
    progress: DocumentProgress | None = None,
) -> Calibrated:
    """Measures thresholds of a model's exits; `Thresholds.write` stores them beside the model.

    Documents are the units of the statement: tokens of one document err together, so a bound over tokens would promise
    too much. Each exit has an equal part of tolerance and error probability, and its threshold is found by testing from
    strict to lax (`refold.engine.risk`). With `kv: propagate` one threshold serves all exits, because tokens that stay
    may change too.

    Args:
        model: Folder, hub id, or a loaded model, with exits.
        data: Held-out text of many independent documents; kinds of text may have weights, their shares of documents.
        options: Tolerance, measure, amount of text.
        tokenizer: Tokenizer of a loaded model; None: the folder's own.
        make_runner: Makes the runner of the live check.
        progress: Told the number of documents of the first pass.

    Raises:
        RefoldError: The model has no exits, or no gate where the measure reads it; or a setting does not fit.
        DataError: The data are missing, broken or empty.
        SourceError: Model or tokenizer is missing or broken.
    """
    options = given_or_default(options, CalibrateOptions, "options")
    subject = open_subject(model, tokenizer, dtype=options.dtype, device=options.device)
    folded = _require_exits(subject.model, subject.facts.name)
    measure = _choose_measure(folded, options.measure)
    kv = _choose_kv(folded, options.kv)
    positions = getattr(folded.config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    context = min(options.context or DEFAULT_CONTEXT, positions)
    source = open_text(data)
    documents = read_documents(source, require_tokenizer(subject), options, context)
    require_known_tokens("data", np.concatenate(documents), folded.vocab_size)
    num_live = min(options.live_documents, len(documents) // _LIVE_SHARE)
    live, measured = documents[:num_live], documents[num_live:]
    table = fill_table(folded, measured, measure, progress)
    if kv == "propagate":
        search: ThresholdSearch = SkippingSearch(table, measure, folded, measured)
    else:
        search = ExactSearch(table, measure)

    @cache
    def check() -> LiveCheck:
        prompts = [ids[: max(1, min(context // 2, len(ids) // 2))].tolist() for ids in live]
        room = min(options.live_tokens, positions - max(map(len, prompts)))
        return LiveCheck(make_runner(folded), prompts, room, len(folded.model.depths))

    levels, notes = _choose_levels(search, options, kv, check if num_live else None)
    found = Thresholds(
        measure=measure,
        kv=kv,
        tolerance=options.tolerance,
        confidence=options.confidence,
        levels=levels,
        documents=len(measured),
        tokens=table.num_tokens,
        context=context,
        corpus=_hash_documents(documents),
        model=model_fingerprint(folded),
    )
    return Calibrated(found, (*notes, *_describe_text(source)))


def _choose_levels(
    search: ThresholdSearch, options: CalibrateOptions, kv: KvPolicy, check: Callable[[], LiveCheck] | None
) -> tuple[tuple[ToleranceLevel, ...], tuple[str, ...]]:
    """Returns the thresholds for each tolerance, smallest first, and notes.

    Args:
        search: Finds thresholds.
        options: Tolerances and confidence.
        kv: Keys and values of skipped depths.
        check: Makes the live check, when a threshold needs it; None: no check.
    """
    levels, notes, several = list[ToleranceLevel](), list[str](), len(options.tolerances) > 1
    before: tuple[Places, LiveShares | None] | None = None
    for tolerance in options.tolerances:
        promise = Promise(tolerance, 1 - options.confidence)
        places, told = search.choose(promise)
        shares = None
        if check is not None and any(place is not None for place in places):
            places, shares, tightened = _tighten(check(), search, places, kv, tolerance)
            told = (*told, *tightened)
        if before is not None and any(_is_stricter(*pair) for pair in zip(places, before[0], strict=True)):
            # Thresholds that keep a smaller tolerance keep this one.
            places, shares = before
        before = places, shares
        levels.append(ToleranceLevel(tolerance=tolerance, live=shares, **search.effect(places, promise)._asdict()))
        notes += [f"tolerance {tolerance:g}: {note}" if several else note for note in told]
    return tuple(levels), tuple(notes)


def _is_stricter(place: int | None, other: int | None) -> bool:
    return other is not None and (place is None or place < other)


def read_documents(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, options: CalibrateOptions, context: int
) -> Documents:
    """Returns the first `context` tokens of documents in a random order.

    Parts of a mixture take turns by their weights, so that each has its share of the documents; the first part that has
    no more documents ends them. The order is that of `options.seed`, and the number is limited by `options.documents`,
    with `options.live_documents` more, and `options.tokens`.

    Raises:
        DataError: There is no text.
    """
    encoder, found, room = TextEncoder(tokenizer), list[np.ndarray](), options.tokens
    texts = islice(_documents(source, options.seed), options.documents + options.live_documents)
    while (room is None or room > 0) and (some := list(islice(texts, _ENCODED_AT_ONCE))):
        for document in encoder.encode(some, context):
            ids = document.ids[: context if room is None else min(context, room)].astype(np.int64)
            room = None if room is None else room - len(ids)
            found += [ids] if len(ids) else []
    if not found:
        raise DataError(f"data: at least one document that is not empty is required (got none in {source.name})")
    return found


def _documents(source: DataSource, seed: int) -> Iterator[str]:
    if not isinstance(source, MixedSource) or source.weights is None:
        yield from source.documents(seed)
        return
    interleave, parts = Interleave(source.weights), [part.documents(seed) for part in source.parts]
    for place in count():
        document = next(parts[interleave.locate(place)[0]], None)
        if document is None:
            return
        yield document


def _describe_text(source: DataSource) -> tuple[str, ...]:
    """Returns the note about text that may be of one kind."""
    if isinstance(source, MixedSource):
        return ()
    return (
        f"calibration text comes from {source.name} alone: the tolerance is kept on text of its kind only; give every "
        f"kind that will be served with its weight: A=0.5 and B=0.5",
    )


def _require_exits(model: PreTrainedModel, name: str) -> RefoldForCausalLM:
    if not isinstance(model, RefoldForCausalLM) or not model.model.exit_depths:
        raise RefoldError(
            f"{name}: a model with exits is required (it has none); convert the source with an `exits` section, and "
            f"heal with the objective `exits`"
        )
    return model


def _choose_measure(model: RefoldForCausalLM, wanted: str | None) -> Measure:
    parts = {index + 1: model.model.exit_parts(index) for index in model.model.exit_depths}
    without = [depths for depths, part in parts.items() if part is None or part.gate is None]
    measure = cast("Measure", wanted or ("top1" if without else "gate"))
    if reads_gate(measure) and without:
        raise RefoldError(
            f"measure: a gate at every exit is required for {measure} (the exit after {without[0]} depths has none); "
            f"choose another measure, or convert with `exits.gate: true`"
        )
    if compares_exits(measure) and len(parts) < 2:
        raise RefoldError(f"measure: two exits are required for {measure} (got one); choose another measure")
    return measure


def _choose_kv(model: RefoldForCausalLM, wanted: str | None) -> KvPolicy:
    """Returns the policy for the keys and values of skipped depths, checked against the stack."""
    blueprint = model.config.read_blueprint()
    first = model.model.exit_depths[0] + 1
    if wanted is None:
        return "recompute" if last_writing_depth(blueprint) >= first else "shared"
    if wanted == "shared" and last_writing_depth(blueprint) >= first:
        raise RefoldError(
            f"kv: no keys and states behind the first exit are required for 'shared' (depth "
            f"{last_writing_depth(blueprint)} keeps some); use 'recompute' or 'propagate', or fold with share_kv"
        )
    recurrent = [index for index in range(first, blueprint.num_depths) if blueprint.keeps_state(index)]
    if wanted == "propagate" and recurrent:
        raise RefoldError(
            f"kv: attention behind the first exit is required for 'propagate' (depth {recurrent[0]} keeps a state); "
            f"use 'recompute'"
        )
    return cast("KvPolicy", wanted)


def _tighten(
    check: LiveCheck, search: ThresholdSearch, places: Places, kv: KvPolicy, tolerance: float
) -> tuple[Places, LiveShares | None, tuple[str, ...]]:
    """Makes all thresholds stricter, in growing steps, until generation keeps the tolerance too.

    Stricter thresholds keep the promise of laxer ones, because they come earlier in the sequence of tests.
    """
    first = shares = check.shares(search.rule(places), kv)
    step, chosen = 1, places
    while shares is not None and shares.differs > tolerance and any(place is not None for place in chosen):
        chosen = tuple(None if place is None or place < step else place - step for place in places)
        shares = check.shares(search.rule(chosen), kv) if any(place is not None for place in chosen) else None
        step *= 2
    if first is None or chosen == places:
        return chosen, shares, ()
    how = "thresholds are stricter" if shares is not None else "no token leaves"
    note = (
        f"in generation {first.differs:.3g} of {first.tokens} tokens differed with the thresholds of the calibration "
        f"text (at most {tolerance:.3g} are allowed), so {how}"
    )
    return chosen, shares, (note,)


def _hash_documents(documents: Documents) -> str:
    digest = hashlib.sha256()
    for ids in documents:
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    return digest.hexdigest()
