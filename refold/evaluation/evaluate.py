"""Evaluation of a model on held-out text, alone or against its source."""

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refold.blueprint.integers import find_scheme
from refold.checkpoint.manifest import hash_file
from refold.checkpoint.provenance import Stage
from refold.data.corpus import MOST_BYTES_PER_TOKEN, Data, open_text
from refold.data.mixture import OTHER_KINDS, MixedSource
from refold.data.readers import DataSource
from refold.data.split import whole_name
from refold.data.spool import SPOOL_BYTES
from refold.data.tokens import TokenisedDocuments, join_tokenised, require_known_tokens, scored_bytes, tokenise
from refold.errors import DataError, RefoldError, given_or_default
from refold.evaluation.cut_reference import CutReference, cut_reference
from refold.evaluation.document_sums import DocumentCounts, ratio_error
from refold.evaluation.reference import Reference
from refold.evaluation.result import (
    Comparison,
    DataFile,
    Evaluation,
    ExitScores,
    KindScores,
    Machine,
    ModelFacts,
    Seconds,
)
from refold.evaluation.settings import EvaluationSettings
from refold.evaluation.subject import Subject, open_subject, require_tokenizer
from refold.evaluation.window_pass import Stopwatch, WindowPass, WindowProgress
from refold.modeling.load import ModelLike
from refold.modeling.quantise import quantise_linears


def describe_data(source: DataSource) -> tuple[DataFile, ...]:
    """Returns name, size and hash of each file of a data source; documents in memory count as one file.

    Raises:
        DataError: A file cannot be read.
    """
    if isinstance(source, MixedSource):
        return tuple(file for part in source.parts for file in describe_data(part))
    if not source.files:
        num_bytes = sum(len(text.encode()) for text in source.documents())
        return (DataFile(name=source.name, bytes=num_bytes, sha256=source.identity),)
    paths = dict.fromkeys(source.files)
    try:
        return tuple(DataFile(name=str(path), bytes=path.stat().st_size, sha256=hash_file(path)) for path in paths)
    except OSError as error:
        raise DataError(f"data: readable files are required ({error.filename}: {error.strerror})") from error


class ReadText(NamedTuple):
    """Tokenised documents, ordered by kind of text.

    Attributes:
        documents: Documents of all kinds.
        kinds: Range of documents of each kind, by name; empty if there is only one kind.
    """

    documents: TokenisedDocuments
    kinds: dict[str, slice]


def read_text(source: DataSource, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> ReadText:
    """Tokenises documents in file order; several kinds of text share the tokens evenly.

    Raises:
        DataError: A kind has no text, or weights are given, which an evaluation does not use.
    """
    if not isinstance(source, MixedSource):
        return ReadText(tokenise(source, tokenizer, budget=max_tokens, seed=None), {})
    if source.weights is not None:
        raise DataError(
            f"data: files without weights are required for an evaluation, which reports each by itself (got "
            f"{source.name}); drop `=WEIGHT`"
        )
    parts: list[TokenisedDocuments] = []
    kinds: dict[str, slice] = {}
    left, first = max_tokens, 0
    for number, part in enumerate(source.parts):
        # If a kind is shorter than its share, the kinds after it get the rest.
        budget = None if left is None else max(1, left // (len(source.parts) - number))
        found = tokenise(part, tokenizer, budget=budget, seed=None)
        left = None if left is None else left - found.num_tokens
        name = part.name if part.name not in kinds else f"{part.name} ({number + 1})"
        kinds[name] = slice(first, first + found.num_documents)
        first += found.num_documents
        parts.append(found)
    return ReadText(join_tokenised(parts), kinds)


def describe_domain(fitted_to: Sequence[str], source: DataSource) -> tuple[str, ...]:
    """Returns a line if a model that was fitted to text is evaluated on no text that is surely of another kind.

    Kinds of text are told apart by the names of data sources: the line is for a single source, and for several that the
    model was fitted to.

    Args:
        fitted_to: Names of the texts that the model was fitted to.
        source: The evaluated text.
    """
    parts = source.parts if isinstance(source, MixedSource) else (source,)
    names = [whole_name(part.name) for part in parts]
    if not fitted_to or (len(parts) > 1 and not set(names) <= set(map(whole_name, fitted_to))):
        return ()
    return (
        f"the model was fitted to {_list(fitted_to)} and is evaluated on {_list(names)} alone: a loss on other kinds "
        f"of text does not show, and it can be three times as large ({OTHER_KINDS}); give text of another kind as a "
        f"second --data",
    )


def _list(names: Sequence[str]) -> str:
    return " and ".join(dict.fromkeys(names))


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
    _require_quantisable(model, settings.quantise)
    source = open_text(data, limit=_byte_limit(settings.max_tokens))
    with watch.measure("load"):
        subject, other = _open_models(model, tokenizer, against, settings)
        vocabulary = require_tokenizer(subject)
    windows = settings.window_sizes(_positions(subject, other))
    with watch.measure("tokenise"):
        files = describe_data(source)
        text = read_text(source, vocabulary, settings.max_tokens)
        require_known_tokens(source.name, text.documents.tokens, _num_embeddings(subject.model))
        sizes = scored_bytes(text.documents, vocabulary)
    scored = WindowPass(subject.model, other, text.documents.num_documents, watch)
    own = None
    if isinstance(other, CutReference):
        with watch.measure("against", subject.model.device):
            own = other.own_sums(source, text.documents, text.kinds, windows)
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
        notes=describe_domain(subject.facts.fitted_to, source),
        **_record_run(subject.model.device, watch, scored.sums.total().num_tokens),
    )


def _byte_limit(max_tokens: int | None) -> int:
    """Returns the bytes of a generator or stream to read at most."""
    return SPOOL_BYTES if max_tokens is None else MOST_BYTES_PER_TOKEN * max_tokens + 2**20


def _require_quantisable(model: ModelLike, scheme: str | None) -> None:
    """Checks the quantisation before a large model is loaded."""
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
) -> tuple[Subject, Reference | CutReference | None]:
    """Loads the evaluated model and the model it is compared with, and checks that the two are comparable."""
    subject = open_subject(model, tokenizer, dtype=settings.dtype, device=settings.device)
    if settings.quantise is not None:
        subject = quantise_subject(subject, settings.quantise)
    if against is None:
        return subject, None
    if not isinstance(against, Reference):
        against = Reference(against, dtype=settings.dtype, device=subject.model.device, remember=0)
    return subject, cut_reference(against, subject)


def _positions(subject: Subject, other: Reference | CutReference | None) -> dict[str, int | None]:
    """Returns the number of positions of each model by its name; None: no limit."""
    found = {subject.facts.name: getattr(subject.model.config, "max_position_embeddings", None)}
    return found if other is None else {**found, other.facts.name: other.positions}


def _num_embeddings(model: PreTrainedModel) -> int:
    return cast("nn.Embedding", model.get_input_embeddings()).num_embeddings


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
