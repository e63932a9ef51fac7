"""Recall of a model: associative, passkey, copying, and verbatim continuation of a text."""

import time
from collections.abc import Callable

from refold.evaluation.document_sums import mean_error
from refold.evaluation.result import short_hash
from refold.scorecard.job import ScoreJob, SectionNotRun
from refold.scorecard.recall.answers import score_answers
from refold.scorecard.recall.associative import make_associative
from refold.scorecard.recall.copying import make_copying
from refold.scorecard.recall.item import RecallCell
from refold.scorecard.recall.passkey import PasskeyText, make_passkey
from refold.scorecard.recall.verbatim import CONTINUATION, make_verbatim
from refold.scorecard.recall.word_pool import WordPool, find_words
from refold.scorecard.record import RecallScore, RecallSection

VERBATIM_LENGTH = 2 * CONTINUATION
"""Tokens of an item of verbatim continuation: as many are given as are continued."""


def measure_recall(job: ScoreJob) -> RecallSection:
    """Measures recall by teacher forcing: nothing is generated.

    `accuracy` is the share of answer tokens that are the model's likeliest token after the right tokens before them,
    and `exact` the share of items whose answer tokens are all right, which greedy decoding would then write. `gain`
    shows recall that is too weak for the likeliest token: the loss of a token at its first mention minus its loss as an
    answer, both after the same token. Items
    depend on tokenizer, seed, length and amounts alone, so that models of one tokenizer answer the same items.

    Raises:
        SectionNotRun: The model has too few positions for the shortest item.
    """
    begun, seed = time.perf_counter(), job.settings.seed
    cells, notes = _make_cells(job)
    if not cells:
        raise SectionNotRun(f"a length within the model's positions is required ({'; '.join(notes)})")
    scores = []
    with job.show.progress(f"{job.subject.facts.name}: recall", "texts") as report:
        for number, cell in enumerate(cells):
            scores.append(_score(job, cell))
            report(number + 1, len(cells))
    return RecallSection(scores=tuple(scores), notes=tuple(notes), seed=seed, seconds=time.perf_counter() - begun)


def _score(job: ScoreJob, cell: RecallCell) -> RecallScore:
    found = score_answers(job.subject.model, cell.items)
    return RecallScore(
        kind=cell.kind,
        length=cell.length,
        depth=cell.depth,
        accuracy=float(found.right.mean()),
        exact=float(found.exact.mean()),
        chance=cell.chance,
        num_items=len(cell.items),
        error=mean_error(found.right),
        gain=None if found.gain is None else float(found.gain.mean()),
        gain_error=None if found.gain is None else mean_error(found.gain),
        items=tuple(short_hash(item.tokens.tobytes()) for item in cell.items),
        right=tuple(found.right.tolist()),
    )


def _make_cells(job: ScoreJob) -> tuple[list[RecallCell], list[str]]:
    """Returns the items of all kinds, and a note for each kind or length that is skipped."""
    amounts, positions = job.settings.amounts, job.subject.positions
    # The last token of an item is only predicted.
    most = max(amounts.recall_lengths, default=0) if positions is None else positions + 1
    lengths = [length for length in amounts.recall_lengths if length <= most]
    notes = [
        f"{length} tokens: skipped, because the model has {positions} positions"
        for length in amounts.recall_lengths
        if length > most
    ]
    pool = find_words(job.subject.tokenizer, job.subject.num_embeddings)
    found = [make() for make in _makers(job, pool, lengths, notes)]
    cells = [each for each in found if isinstance(each, RecallCell)]
    notes += [each for each in found if isinstance(each, str)]
    if job.data is None:
        notes.append("verbatim: skipped, because no text is given")
    elif job.subject.tokenizer is not None and (positions is None or positions + 1 >= VERBATIM_LENGTH):
        try:
            cells.append(make_verbatim(job, VERBATIM_LENGTH))
            notes.append("verbatim: on training text the share that is memorised, on held-out text the floor of it")
        except SectionNotRun as error:
            notes.append(f"verbatim: skipped, because {error}")
    else:
        notes.append(f"verbatim: skipped, because a tokenizer and {VERBATIM_LENGTH - 1} positions are required")
    return cells, list(dict.fromkeys(notes))


def _makers(
    job: ScoreJob, pool: WordPool, lengths: list[int], notes: list[str]
) -> list[Callable[[], RecallCell | str]]:
    """Returns functions that make the items of each kind, length and depth, or say why there are none."""
    amounts, seed = job.settings.amounts, job.settings.seed
    count = amounts.recall_items
    found: list[Callable[[], RecallCell | str]] = []
    found += [lambda n=length: make_associative(pool, n, count, seed) for length in lengths]
    found += [lambda n=length: make_copying(pool, n, count, seed) for length in lengths]
    if job.subject.tokenizer is None:
        notes.append("passkey: skipped, because the model has no tokenizer")
        return found
    text = PasskeyText.of(job.subject.tokenizer)
    found += [
        lambda n=length, at=depth: make_passkey(pool, text, n, at, count, seed)
        for length in lengths
        for depth in amounts.needle_depths
    ]
    return found
