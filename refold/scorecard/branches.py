"""Text loss of a hybrid with each of its branches off: mixers of one kind, or one branch inside its mixers."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from refold.blueprint.schema import Blueprint
from refold.data.tokens import TokenisedDocuments, scored_bytes
from refold.evaluation.document_sums import DocumentFloats, ratio_error
from refold.evaluation.settings import BATCH_TOKENS
from refold.evaluation.subject import require_tokenizer
from refold.evaluation.window_pass import Stopwatch, WindowPass
from refold.modeling.model import RefoldForCausalLM
from refold.nn.mixers.mixer import Mixer
from refold.scorecard.job import ScoreJob, SectionNotRun
from refold.scorecard.openings import OpeningAmounts, fitting_opening, read_openings, require_text
from refold.scorecard.record import BranchScore


class Branch(NamedTuple):
    """A branch that can be off.

    Attributes:
        name: Its name in results.
        depths: Depths at which it is off.
        part: The branch inside the mixers; None: the whole mixers, whose update of the residual stream is zero.
    """

    name: str
    depths: tuple[int, ...]
    part: str | None = None


def measure_branches(job: ScoreJob) -> tuple[BranchScore, ...]:
    """Measures the loss of a hybrid on the openings of documents with each branch off.

    A hybrid has mixers of several kinds (attention and a recurrent mixer, windowed and full attention), or mixers that
    add two branches (softmax in a window beside features). First each kind is off at all its depths, then at one depth
    alone, kinds with few depths first, up to `branch_layers` depths. A loss that stays says that the branch does
    nothing; a loss that grows does not say that a model healed without the branch would be worse.

    Raises:
        SectionNotRun: The model is no hybrid or no folded model, or there is no text.
    """
    model = job.subject.model
    if not isinstance(model, RefoldForCausalLM):
        raise SectionNotRun(f"a folded model with mixers of several kinds is required (got {model.config.model_type})")
    branches = find_branches(model, job.settings.amounts.branch_layers)
    require_text(job)
    amounts = job.settings.amounts
    text = read_openings(job, OpeningAmounts(amounts.documents, fitting_opening(job, amounts.opening)))
    sizes = scored_bytes(text, require_tokenizer(job.subject))
    num_bytes, scores = int(sizes.sum()), list[BranchScore]()
    whole = _score(model, text)
    with job.show.progress(f"{job.subject.facts.name}: branches", "branches") as report:
        for number, branch in enumerate(branches):
            with branch_off(model, branch):
                found = _score(model, text)
            more = (found - whole) / math.log(2)
            scores.append(
                BranchScore(
                    branch=branch.name,
                    bits_per_byte=float(found.sum()) / math.log(2) / num_bytes,
                    difference=float(more.sum()) / num_bytes,
                    difference_error=ratio_error(more, sizes),
                    num_documents=text.num_documents,
                )
            )
            report(number + 1, len(branches))
    return tuple(scores)


def find_branches(model: RefoldForCausalLM, most_layers: int) -> list[Branch]:
    """Returns the branches of a hybrid: each kind at all its depths, then single depths.

    Args:
        model: The model.
        most_layers: Most single depths.

    Raises:
        SectionNotRun: All mixers are of one kind that has no branches.
    """
    blueprint = model.config.read_blueprint()
    kinds: dict[str, list[int]] = {}
    for index, depth in enumerate(blueprint.depths):
        if depth.mixer is not None:
            kinds.setdefault(_kind(blueprint, index), []).append(index)
    groups: list[Branch] = []
    for name, depths in sorted(kinds.items(), key=lambda kind: len(kind[1])):
        if len(kinds) > 1:
            groups.append(Branch(name, tuple(depths)))
        mixer = _mixer_at(model, depths[0])
        groups += [Branch(f"{name}: {part}", tuple(depths), part) for part in mixer.branches]
    if not groups:
        described = f"all {blueprint.num_depths} depths have {next(iter(kinds), 'no mixer')}"
        raise SectionNotRun(f"a hybrid is required, with mixers of several kinds ({described})")
    single = [
        Branch(f"depth {depth}: {group.name}", (depth,), group.part)
        for group in groups
        for depth in group.depths
        if len(group.depths) > 1
    ]
    return [group._replace(name=f"all {group.name}") for group in groups] + single[:most_layers]


@contextmanager
def branch_off(model: RefoldForCausalLM, branch: Branch) -> Iterator[None]:
    """Turns a branch off within the body.

    Args:
        model: The model.
        branch: Of its branches.
    """
    hooks: list[RemovableHandle] = []
    for index in {id(_mixer_at(model, depth)): depth for depth in branch.depths}.values():
        hooks += _hook(_mixer_at(model, index), branch.depths, branch.part)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(mixer: Mixer, depths: Collection[int], part: str | None) -> list[RemovableHandle]:
    """Hooks a stored mixer, which several depths may run; its second argument names the depth that runs it."""

    def drop_part(module: Any, given: tuple[Any, ...]) -> None:
        module.dropped_branch = part if given[1].layer_idx in depths else None

    def finish(module: Any, given: tuple[Any, ...], found: Any) -> Any:
        module.dropped_branch = None
        update, made = found
        # Keys and values stay, because later depths may read them.
        return (torch.zeros_like(update), made) if part is None and given[1].layer_idx in depths else None

    return [mixer.register_forward_pre_hook(drop_part), mixer.register_forward_hook(finish)]


def _mixer_at(model: RefoldForCausalLM, depth: int) -> Mixer:
    mixer: Any = model.model.parts_of(model.model.depths[depth]).mixer  # pyright: ignore[reportArgumentType]
    assert isinstance(mixer, Mixer)
    return mixer


def _kind(blueprint: Blueprint, index: int) -> str:
    """Returns the kind of the mixer at a depth: its type, and the window of attention."""
    depth = blueprint.depths[index]
    assert depth.mixer is not None
    name = blueprint.mixers[depth.mixer].mixer.type
    return name if depth.window is None else f"{name} in a window of {depth.window}"


def _score(model: RefoldForCausalLM, text: TokenisedDocuments) -> DocumentFloats:
    """Returns the negative log-likelihood of each document, nats; every document is one window."""
    scored = WindowPass(model, None, text.num_documents, Stopwatch())
    longest = max(len(text.document(index)) for index in range(text.num_documents)) - 1
    scored.run(text, longest, longest, max(1, BATCH_TOKENS // longest), None)
    return scored.sums.nll
