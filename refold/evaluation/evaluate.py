"""Evaluation of a model on held-out text, alone or against its source."""

import math
import os
import platform
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refold.blueprint.integers import find_scheme
from refold.checkpoint.provenance import Stage
from refold.data.corpus import MOST_BYTES_PER_TOKEN, Data, open_text
from refold.data.readers import DataSource
from refold.data.spool import SPOOL_BYTES
from refold.data.tokens import require_known_tokens, scored_bytes
from refold.errors import DataError, RefoldError, given_or_default
from refold.evaluation.cut_reference import CutReference, cut_reference
from refold.evaluation.document_sums import DocumentCounts, ratio_error
from refold.evaluation.reference import Reference
from refold.evaluation.result import (
    NAT_DIGITS,
    Comparison,
    DocumentScores,
    Evaluation,
    ExitScores,
    KindScores,
    Machine,
    ModelFacts,
    Seconds,
)
from refold.evaluation.settings import EvaluationSettings
from refold.evaluation.subject import Subject, open_subject, require_tokenizer
from refold.evaluation.text import describe_data, describe_domain, hash_documents, read_text
from refold.evaluation.window_pass import Stopwatch, WindowPass, WindowProgress
from refold.modeling.load import ModelLike
from refold.modeling.quantise import quantise_linears


def quantise_subject(subject: Subject, name: str) -> Subject:
    """Rounds the weights of a subject's linears in place; their bytes then are those of integers with scales.

    Args:
        subject: A subject that was loaded for this evaluation.
        name: Name of the scheme.

    Raises:
        RefoldError: There is no scheme of this name.
    """
    scheme, facts = find_scheme(name), subject.facts
    weights = quantise_linears(subject.model, scheme)
    stored = getattr(torch, facts.dtype).itemsize
    before = sum(weight.numel() * min(weight.element_size(), stored) for weight in weights)
    after = sum(scheme.num_bytes(*weight.shape) for weight in weights)
    changes = {"quantised": name, "weight_bytes": facts.weight_bytes - before + after}
    return replace(subject, facts=facts.model_copy(update=changes))


def evaluate(
    model: ModelLike,
    data: Data,
    settings: EvaluationSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    against: ModelLike | Reference | None = None,
    progress: WindowProgress | None = None,
) -> Evaluation:
    """Measures how well a model, folded or not, predicts a text.

    Every token of a document is scored once, from windows that overlap (`refold.data.windows` has the rule). Results
    are comparable only at the same data, context and stride, so each result states them. The first token of a document
    is not scored if the tokenizer has no start token to put before it; its bytes then do not count either.

    Args:
        model: Folder, hub id, or a loaded model.
        data: Files and folders, texts, data frames, data sets, generators: see `refold.data.corpus`. Documents are
            read in file order. Several data sources side by side are kinds of text; each is reported too.
        settings: Windows, amount of text, dtype, device, quantisation.
        tokenizer: Tokenizer of a loaded model; None: the folder's own.
        against: Another model with the same vocabulary, usually the source; both run on the same windows. A
            `Reference`, which has its own dtype and device, runs once for any number of evaluations. A model with a cut
            vocabulary is compared with its source too, see `Comparison.kept_tokens`.
        progress: Called with the number of windows done and of all windows.

    Raises:
        DataError: The data are missing, broken or empty; the context or stride does not fit.
        SourceError: A model or tokenizer is missing or broken, or the vocabularies differ.
        RefoldError: The device or dtype is not available, `quantise` is no scheme or given for a loaded model, or the
            model's predictions are not finite.
    """
    settings, watch = given_or_default(settings, EvaluationSettings, "settings"), Stopwatch()
    require_quantisable(model, settings.quantise)
    source = open_evaluated_text(data, settings.max_tokens)
    with watch.measure("load"):
        subject, against = _open_models(model, tokenizer, against, settings)
    return evaluate_subject(subject, source, settings, against=against, progress=progress, watch=watch)


def evaluate_subject(
    subject: Subject,
    data: Data,
    settings: EvaluationSettings,
    *,
    against: Reference | None = None,
    progress: WindowProgress | None = None,
    watch: Stopwatch | None = None,
) -> Evaluation:
    """Measures how well an opened model predicts a text, as `evaluate` does.

    Args:
        subject: The model, on its device and rounded if it should be; `dtype`, `device` and `quantise` of the settings
            are not used.
        data: The text.
        settings: Windows and amount of text.
        against: The model to compare with.
        progress: Called with the number of windows done and of all windows.
        watch: Stopwatch that has the seconds of loading; None: a new one.

    Raises:
        DataError: As for `evaluate`.
        SourceError: There is no tokenizer, or the vocabularies differ.
        RefoldError: The devices differ, or predictions are not finite.
    """
    watch = watch or Stopwatch()
    source = open_evaluated_text(data, settings.max_tokens)
    with watch.measure("load"):
        other = None if against is None else cut_reference(against, subject)
        vocabulary = require_tokenizer(subject)
    windows = settings.window_sizes(_positions(subject, other))
    with watch.measure("tokenise"):
        files = describe_data(source)
        text = read_text(source, vocabulary, settings.max_tokens)
        require_known_tokens(source.name, text.documents.tokens, subject.num_embeddings)
        sizes = scored_bytes(text.documents, vocabulary)
        hashes = hash_documents(source, text)
    scored = WindowPass(subject.model, other, text.documents.num_documents, watch)
    own = None
    if isinstance(other, CutReference):
        with watch.measure("against", subject.model.device):
            own = other.own_sums(source, text, windows)
    scored.run(text.documents, *windows, progress)
    if own is not None:
        scored.against_sums = own
    _require_finite(subject.facts, scored.sums.total().nll)
    sizes = scored.sums.without_unscored(sizes)
    return Evaluation(
        model=subject.facts,
        data=files,
        is_whole_data=text.documents.is_whole_source,
        max_tokens=settings.max_tokens,
        **windows._asdict(),
        **_scores(scored, sizes),
        exits=_exits(scored, int(sizes.sum())),
        kinds=tuple(_kind(name, scored, sizes, rows, other is not None) for name, rows in text.kinds.items()),
        against=None if other is None else _comparison(scored, other, sizes),
        by_document=_by_document(scored, sizes, hashes),
        notes=describe_domain(subject.facts.fitted_to, source),
        **_record_run(subject.model.device, watch, scored.sums.total().num_tokens),
    )


def open_evaluated_text(data: Data, max_tokens: int | None) -> DataSource:
    """Opens the text of an evaluation of at most so many tokens, as one source that can be read several times.

    Raises:
        DataError: The data are missing, broken or empty.
    """
    # The bytes of a generator or stream to read at most.
    return open_text(data, limit=SPOOL_BYTES if max_tokens is None else MOST_BYTES_PER_TOKEN * max_tokens + 2**20)


def require_quantisable(model: ModelLike, scheme: str | None) -> None:
    """Checks the quantisation before a large model is loaded.

    Raises:
        RefoldError: There is no such scheme, or the model is loaded already.
    """
    if scheme is None:
        return
    find_scheme(scheme)
    if isinstance(model, PreTrainedModel):
        raise RefoldError(
            "quantise: a model's folder is required (got a loaded model, whose weights would be changed); save it"
        )


def _open_models(
    model: ModelLike,
    tokenizer: PreTrainedTokenizerBase | None,
    against: ModelLike | Reference | None,
    settings: EvaluationSettings,
) -> tuple[Subject, Reference | None]:
    """Loads the evaluated model, and makes a reference of the model that it is compared with."""
    subject = open_subject(model, tokenizer, dtype=settings.dtype, device=settings.device)
    if settings.quantise is not None:
        subject = quantise_subject(subject, settings.quantise)
    if against is not None and not isinstance(against, Reference):
        against = Reference(against, dtype=settings.dtype, device=subject.model.device, remember=0)
    return subject, against


def _positions(subject: Subject, other: Reference | CutReference | None) -> dict[str, int | None]:
    """Returns the number of positions of each model by its name; None: no limit."""
    found = {subject.facts.name: subject.positions}
    return found if other is None else {**found, other.facts.name: other.positions}


def _scores(scored: WindowPass, sizes: DocumentCounts) -> dict[str, Any]:
    """Returns the fields of an evaluation that are figures of the model over all text."""
    total, num_bytes = scored.sums.total(), int(sizes.sum())
    return {
        "documents": int((scored.sums.num_tokens > 0).sum()),
        "tokens": total.num_tokens,
        "bytes": num_bytes,
        "bits_per_byte": total.bits_per_byte(num_bytes),
        "bits_per_byte_error": ratio_error(scored.sums.nll / math.log(2), sizes),
        "perplexity": total.perplexity,
        "accuracy": total.accuracy,
    }


def _by_document(scored: WindowPass, sizes: DocumentCounts, hashes: tuple[str, ...]) -> DocumentScores:
    sums = scored.sums
    return DocumentScores(
        hashes=hashes,
        bytes=tuple(map(int, sizes)),
        tokens=tuple(map(int, sums.num_tokens)),
        right=tuple(map(int, sums.num_correct)),
        nats=tuple(round(float(each), NAT_DIGITS) for each in sums.nll),
    )


def _record_run(device: torch.device, watch: Stopwatch, num_tokens: int) -> dict[str, Any]:
    """Returns the fields of an evaluation that record its time, its machine and the versions of libraries."""
    seconds, stage = Seconds(**{name: watch.seconds[name] for name in Seconds.model_fields}), Stage(stage="evaluate")
    return {
        "seconds": seconds,
        "tokens_per_second": num_tokens / (seconds.model + seconds.against + seconds.score),
        "machine": describe_machine(device),
        "versions": stage.versions,
        "time": stage.time,
    }


def _exits(scored: WindowPass, num_bytes: int) -> tuple[ExitScores, ...]:
    totals = [sums.total() for sums in scored.exit_sums]
    return tuple(
        ExitScores(
            depths=depths,
            bits_per_byte=total.bits_per_byte(num_bytes),
            perplexity=total.perplexity,
            accuracy=total.accuracy,
            agreement=total.agreement,
            kl=total.mean_kl,
            gate_accuracy=right / total.num_tokens if gated else None,
        )
        for depths, total, gated, right in zip(scored.exits, totals, scored.gated, scored.right_gates, strict=True)
    )


def _kind(name: str, scored: WindowPass, sizes: DocumentCounts, documents: slice, is_compared: bool) -> KindScores:
    total, own = scored.sums.total(documents), sizes[documents]
    num_bytes = int(own.sum())
    if not num_bytes:
        raise DataError(f"{name}: a document of at least two tokens is required (got none); give more of it")
    found = KindScores(
        name=name,
        documents=int((scored.sums.num_tokens[documents] > 0).sum()),
        tokens=total.num_tokens,
        bytes=num_bytes,
        rows=(documents.start, documents.stop),
        bits_per_byte=total.bits_per_byte(num_bytes),
        bits_per_byte_error=ratio_error(scored.sums.nll[documents] / math.log(2), own),
        perplexity=total.perplexity,
        accuracy=total.accuracy,
    )
    if not is_compared:
        return found
    theirs = scored.against_sums
    more = (scored.sums.nll[documents] - theirs.nll[documents]) / math.log(2)
    comparison = {
        "difference": found.bits_per_byte - theirs.total(documents).bits_per_byte(num_bytes),
        "difference_error": ratio_error(more, own),
        "agreement": total.agreement,
        "kl": total.mean_kl,
    }
    return found.model_copy(update=comparison)


def _comparison(scored: WindowPass, other: Reference | CutReference, sizes: DocumentCounts) -> Comparison:
    total, theirs = scored.sums.total(), scored.against_sums.total()
    _require_finite(other.facts, theirs.nll)
    num_bytes = int(sizes.sum())
    return Comparison(
        model=other.facts,
        bits_per_byte=theirs.bits_per_byte(num_bytes),
        bits_per_byte_error=ratio_error(scored.against_sums.nll / math.log(2), sizes),
        perplexity=theirs.perplexity,
        accuracy=theirs.accuracy,
        difference=total.bits_per_byte(num_bytes) - theirs.bits_per_byte(num_bytes),
        difference_error=ratio_error((scored.sums.nll - scored.against_sums.nll) / math.log(2), sizes),
        agreement=total.agreement,
        kl=total.mean_kl,
        kept_tokens=other.num_kept if isinstance(other, CutReference) else None,
    )


def _require_finite(facts: ModelFacts, nll: float) -> None:
    if not math.isfinite(nll):
        raise RefoldError(
            f"{facts.name}: finite predictions are required (got {nll} in {facts.computed_in}); the "
            f"weights are broken, or the dtype is too narrow: try float32"
        )


def describe_machine(device: torch.device) -> Machine:
    """Returns the facts of this machine for a result."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return Machine(
        device=str(device),
        device_name=name,
        cpus=os.cpu_count() or 1,
        torch_threads=torch.get_num_threads(),
        system=platform.platform(),
    )
