"""Evaluates a model on held-out text, alone or beside its source."""

import math
import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refold.blueprint.quantisation import find_scheme
from refold.checkpoint.manifest import hash_file
from refold.checkpoint.provenance import Stage
from refold.data.corpus import MOST_BYTES_PER_TOKEN, Data, open_text
from refold.data.mixture import MixedSource
from refold.data.readers import DataSource
from refold.data.spool import SPOOL_BYTES
from refold.data.tokens import TokenisedDocuments, join_tokenised, require_known_tokens, scored_bytes, tokenise
from refold.errors import DataError, RefoldError
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
from refold.evaluation.subject import Subject, open_subject, require_tokenizer
from refold.evaluation.window_pass import Stopwatch, WindowPass, WindowProgress
from refold.modeling.load import ModelLike
from refold.modeling.quantise import quantise_linears


def describe_data(source: DataSource) -> tuple[DataFile, ...]:
    """Hashes the files of a data source; documents in memory go by their name and digest.

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
    """Tokenised documents, those of one kind of text side by side.

    Attributes:
        documents: of all kinds.
        kinds: by name, the range of documents of each kind; empty where there is one kind only.
    """

    documents: TokenisedDocuments
    kinds: dict[str, slice]


def read_text(source: DataSource, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> ReadText:
    """Tokenises the documents in file order; of several kinds of text each gets an even share of the tokens.

    Raises:
        DataError: A kind has no text, or weights are given, which an evaluation has no use for.
    """
    if not isinstance(source, MixedSource):
        return ReadText(tokenise(source, tokenizer, budget=max_tokens, seed=None), {})
    if source.weights is not None:
        raise DataError(
            f"data: files without weights are required for an evaluation, which reports each by itself (got "
            f"{source.name}); leave out `=WEIGHT`"
        )
    parts: list[TokenisedDocuments] = []
    kinds: dict[str, slice] = {}
    left, first = max_tokens, 0
    for number, part in enumerate(source.parts):
        # A kind shorter than its share leaves the rest to those after it.
        budget = None if left is None else max(1, left // (len(source.parts) - number))
        found = tokenise(part, tokenizer, budget=budget, seed=None)
        left = None if left is None else left - found.num_tokens
        name = part.name if part.name not in kinds else f"{part.name} ({number + 1})"
        kinds[name] = slice(first, first + found.num_documents)
        first += found.num_documents
        parts.append(found)
    return ReadText(join_tokenised(parts), kinds)


def quantise_subject(subject: Subject, name: str) -> Subject:
    """Rounds the weights of a subject's linears in place, and counts their bytes as integers with scales.

    Args:
        subject: Loaded for this evaluation.
        name: Of the scheme.

    Raises:
        RefoldError: There is no such scheme.
    """
    scheme, facts = find_scheme(name), subject.facts
    weights = quantise_linears(subject.model, scheme)
    stored = getattr(torch, facts.dtype).itemsize
    before = sum(weight.numel() * min(weight.element_size(), stored) for weight in weights)
    after = sum(scheme.num_bytes(*weight.shape) for weight in weights)
    changes = {"quantised": name, "weight_bytes": facts.weight_bytes - before + after}
    return replace(subject, facts=facts.model_copy(update=changes))


DEFAULT_CONTEXT = 1024
"""Tokens in a window where neither the caller nor the model's positions ask for fewer."""
BATCH_TOKENS = 4096
"""Tokens in a batch of windows where no batch size is given."""


def evaluate(
    model: ModelLike,
    data: Data,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    against: ModelLike | Reference | None = None,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantise: str | None = None,
    progress: WindowProgress | None = None,
) -> Evaluation:
    """Measures how well a model, folded or not, predicts a text.

    Every token of a document is scored once, from windows that overlap (`refold.data.windows` has the rule). Figures
    compare only at the same data, context and stride, so the result states them. A document's first token is not scored
    where the tokenizer has no start token to put before it; its bytes then do not count either.

    Args:
        model: Folder, hub id, or a loaded model.
        data: Files and folders, texts, data frames, data sets, generators: see `refold.data.corpus`. Documents are
            taken in file order. Of several things named side by side each is reported too, as a kind of text.
        tokenizer: Needed with a loaded model; else the folder's own.
        against: Another model with the same vocabulary, usually the source: both run on the same windows. As a
            `Reference`, which has a dtype and device of its own, it runs once for any number of evaluations.
        context: Tokens in a window; None: 1,024, or as many positions as the models have if that is less.
        stride: Tokens scored by each window of a document after its first; None: half the context.
        max_tokens: Stop after so many tokens of the data, start tokens included, shared out evenly among several kinds;
            None: all of it.
        batch_size: Windows in a batch; None: as many as 4,096 tokens hold.
        dtype: Of the weights of models that are loaded here; None: as stored, or float32 where that is slow.
        device: Where they are loaded to; None: the best there is, or where a loaded `model` lies.
        quantise: `int8` or `int4`: round the weights of the model's linears to that (the other model's are not), see
            `refold.blueprint.quantisation`; only of a model that is loaded here.
        progress: Told how far it is.

    Raises:
        DataError: The data are missing, broken or empty; the context or stride does not fit.
        SourceError: A model or tokenizer is missing or broken, or the vocabularies differ.
        RefoldError: The device or dtype cannot be had, `quantise` is no scheme or given for a loaded model, or the
            model's numbers are not finite.
    """
    if quantise is not None:
        find_scheme(quantise)  # Before a large model is loaded.
        if isinstance(model, PreTrainedModel):
            raise RefoldError(
                "quantise: a model's folder is required (got a loaded model, whose weights would be changed); save it"
            )
    watch = Stopwatch()
    source = open_text(data, limit=SPOOL_BYTES if max_tokens is None else MOST_BYTES_PER_TOKEN * max_tokens + 2**20)
    with watch.measure("load"):
        subject = open_subject(model, tokenizer, dtype=dtype, device=device)
        if quantise is not None:
            subject = quantise_subject(subject, quantise)
        other = None
        if against is not None:
            there = {"dtype": dtype, "device": subject.model.device, "remember": 0}
            other = against if isinstance(against, Reference) else Reference(against, **there)
            other.check(subject)
        vocabulary = require_tokenizer(subject)
    positions = {subject.facts.name: getattr(subject.model.config, "max_position_embeddings", None)}
    if other is not None:
        positions[other.facts.name] = other.positions
    context, stride, batch_size = _sizes(positions, context, stride, batch_size)
    with watch.measure("tokenise"):
        files = describe_data(source)
        tokenised, kinds = read_text(source, vocabulary, max_tokens)
        num_rows = cast("nn.Embedding", subject.model.get_input_embeddings()).num_embeddings
        require_known_tokens(source.name, tokenised.tokens, num_rows)
        sizes = scored_bytes(tokenised, vocabulary)
    scored = WindowPass(subject.model, other, tokenised.num_documents, watch)
    scored.run(tokenised, context, stride, batch_size, progress)
    if other is not None:
        other.let_go()
    total = scored.sums.total()
    _require_finite(subject.facts, total.nll)
    sizes = np.where(scored.sums.num_tokens > 0, sizes, 0)
    num_bytes = int(sizes.sum())
    seconds = Seconds(**{name: watch.seconds[name] for name in Seconds.model_fields})
    stage = Stage(stage="evaluate")
    return Evaluation(
        model=subject.facts,
        data=files,
        is_whole_data=tokenised.is_whole_source,
        max_tokens=max_tokens,
        context=context,
        stride=stride,
        batch_size=batch_size,
        documents=int((scored.sums.num_tokens > 0).sum()),
        tokens=total.num_tokens,
        bytes=num_bytes,
        bits_per_byte=total.bits_per_byte(num_bytes),
        bits_per_byte_error=ratio_error(scored.sums.nll / math.log(2), sizes),
        perplexity=total.perplexity,
        accuracy=total.accuracy,
        exits=_exits(scored, num_bytes),
        kinds=tuple(_kind(name, scored, sizes, documents, other is not None) for name, documents in kinds.items()),
        against=None if other is None else _comparison(scored, other, sizes),
        seconds=seconds,
        tokens_per_second=total.num_tokens / (seconds.model + seconds.against + seconds.score),
        machine=_machine(subject.model.device),
        versions=stage.versions,
        time=stage.time,
    )


def _sizes(
    positions: Mapping[str, int | None], context: int | None, stride: int | None, batch_size: int | None
) -> tuple[int, int, int]:
    known = {name: int(limit) for name, limit in positions.items() if limit is not None}
    if context is None:
        context = min([DEFAULT_CONTEXT, *known.values()])
    if context < 1:
        raise DataError(f"context: at least 1 token is required (got {context})")
    for name, limit in known.items():
        if context > limit:
            raise DataError(f"context: must be at most {limit}, the positions of {name} (got {context})")
    stride = max(1, context // 2) if stride is None else stride
    batch_size = max(1, BATCH_TOKENS // context) if batch_size is None else batch_size
    if batch_size < 1:
        raise DataError(f"batch_size: at least 1 window is required (got {batch_size})")
    return context, stride, batch_size


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


def _comparison(scored: WindowPass, other: Reference, sizes: DocumentCounts) -> Comparison:
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
    )


def _require_finite(facts: ModelFacts, nll: float) -> None:
    if not math.isfinite(nll):
        raise RefoldError(
            f"{facts.name}: finite predictions are required (got {nll} in {facts.computed_in}); the "
            f"weights are broken, or the dtype is too narrow: try float32"
        )


def _machine(device: torch.device) -> Machine:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return Machine(
        device=str(device),
        device_name=name,
        cpus=os.cpu_count() or 1,
        torch_threads=torch.get_num_threads(),
        system=platform.platform(),
    )
