"""The engine: a model that answers many prompts at once, with exits, drafts and packed weights."""

import threading
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from refold.blueprint.passes import Passes, find_passes, last_writing_depth, recurrent_depths
from refold.checkpoint.companions import offers_tokenizer
from refold.checkpoint.locate import Source, locate
from refold.data.tokens import require_known_tokens
from refold.engine.batcher import DepthBatcher
from refold.engine.drafts import Drafter
from refold.engine.exits import ExitRule, LiveExits
from refold.engine.opening import open_model, pack
from refold.engine.report import EngineReport
from refold.engine.results import Result
from refold.engine.sampler import Sampler
from refold.engine.sequence import Request
from refold.engine.sequence import Sequence as Row
from refold.engine.settings import EngineSettings, KvPolicy
from refold.engine.sizing import make_pools, max_tokens
from refold.engine.stops import ChoiceText
from refold.engine.threads import set_threads
from refold.errors import RefoldError, given_or_default
from refold.generation.limits import end_tokens, new_tokens_room, position_limit
from refold.generation.prompts import Messages, encode_prompt
from refold.generation.sampling import Sampling
from refold.modeling.load import ModelLike, load_tokenizer

AnyPrompt = str | Sequence[int] | Messages
"""A text, token ids, or the messages of a conversation."""


class Engine:
    """A model that answers many prompts at once.

    Sequences at different loops of a folded model share launches of the block, each with the LoRA, vectors and keys of
    its own depth (Continuous Depth-wise Batching, arXiv 2410.20672). A sequence that ends, or leaves at an exit, makes
    room at once. Greedy tokens do not depend on the other prompts.

    Args:
        model: Folder or hub id of a model, folded or not, or a loaded folded model, which stays as it is.
        settings: Of the engine; None: the defaults.
        tokenizer: Of a loaded model; None: the folder's own, or none: prompts are token ids then.
        device: Where a folder is loaded to; None: the best there is.

    Raises:
        SourceError: The model or its tokenizer is missing or broken.
        FolderError: The folder is torn.
        RefoldError: A setting does not fit the model.
    """

    def __init__(
        self,
        model: ModelLike,
        settings: EngineSettings | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device | None = None,
    ):
        settings = given_or_default(settings, EngineSettings, "settings")
        is_folder = not isinstance(model, nn.Module)
        self.tokenizer = _find_tokenizer(model) if tokenizer is None and is_folder else tokenizer
        set_threads(settings.threads)
        opened = open_model(model, device=device)
        rule, kv = _exit_rule(opened, settings)  # thresholds name the weights as they are stored, which packing changes
        self.model, self.weights = pack(opened, settings, is_folder)
        self.settings = settings
        self._blueprint = self.model.config.read_blueprint()
        self.kv = _kv_policy(self._blueprint, kv, rule)
        limit = position_limit(self.model)
        self.max_context = settings.max_context or limit or _UNBOUNDED
        if limit is not None and self.max_context > limit:
            raise RefoldError(f"max_context: must be at most the model's {limit} positions (got {self.max_context})")
        self._lock = threading.RLock()
        self._pools = make_pools(self.model, settings, self.max_context)
        self._max_tokens = max_tokens(self._pools, self.max_context)
        self._vocab_size = cast("nn.Embedding", self.model.get_input_embeddings()).num_embeddings
        self._sampler = Sampler(self._vocab_size, settings.max_rows, self.model.device)
        drafter = None
        if settings.drafts is not None:
            depth = _draft_depth(self._blueprint, settings)
            drafter = Drafter(self.model, self._sampler, settings.drafts, depth)
        self._drafter = drafter
        exits = None if rule is None else LiveExits(self.model, rule)
        self._batcher = DepthBatcher(self.model, self._pools, self._sampler, settings, self.kv, exits, drafter)
        self._ends = end_tokens(self.model, self.tokenizer)
        self._numbers = count()
        self._done: dict[int, Request] = {}
        self._is_closed = False

    @property
    def passes(self) -> Passes:
        """The segments of the stack."""
        return self._batcher.passes()

    def generate(
        self,
        prompts: AnyPrompt | Sequence[AnyPrompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        chat: bool = False,
    ) -> list[Result]:
        """Answers prompts and returns their results in order.

        Args:
            prompts: Texts, lists of token ids, conversations, or one of them.
            sampling: For all of them, or one for each; None: greedy.
            chat: Whether to apply the chat template to texts; to conversations it always applies.

        Raises:
            RefoldError: A prompt is empty, too long or outside the vocabulary, or a setting does not fit; nothing has
                run then.
        """
        return sorted(self.completed(prompts, sampling, chat=chat), key=lambda result: result.index)

    def completed(
        self,
        prompts: AnyPrompt | Sequence[AnyPrompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        chat: bool = False,
    ) -> Iterator[Result]:
        """Answers prompts and yields results in the order of completion; arguments and errors as for `generate`.

        The call itself raises the errors. Closing the iterator cancels the prompts that have not ended.
        """
        given = _listed(prompts)
        settings = [sampling] * len(given) if sampling is None or isinstance(sampling, Sampling) else list(sampling)
        if len(settings) != len(given):
            raise RefoldError(f"sampling: one for each of the {len(given)} prompts is required (got {len(settings)})")
        requests = [
            self.prepare(prompt, each, chat=chat, index=index)
            for index, (prompt, each) in enumerate(zip(given, settings, strict=True))
        ]
        return self._completed(requests)

    def _completed(self, requests: list[Request]) -> Iterator[Result]:
        open_requests = {id(request): request for request in requests}
        try:
            for request in requests:
                self.submit(request)
            while open_requests:
                ended = [key for key in open_requests if self._done.pop(key, None) is not None]
                for key in ended:
                    yield open_requests.pop(key).result()
                if open_requests and not ended:
                    self.step()
        finally:
            for request in open_requests.values():
                self.cancel(request)
                self._done.pop(id(request), None)

    def prepare(
        self,
        prompt: AnyPrompt,
        sampling: Sampling | None = None,
        *,
        chat: bool = False,
        index: int | None = None,
        forced: Sequence[int] | None = None,
    ) -> Request:
        """Checks a prompt with its settings and returns a request that `submit` takes.

        Args:
            prompt: The prompt.
            sampling: Settings; None: greedy.
            chat: As for `generate`.
            index: Its number in the result; None: counted.
            forced: Tokens that it goes on with, whatever is predicted.

        Raises:
            RefoldError: As for `generate`.
        """
        sampling = given_or_default(sampling, Sampling, "sampling")
        ids = self._encode(prompt, chat)
        self._sampler.require_fitting(sampling)
        depth, num_depths = sampling.exit_depth, self._blueprint.num_depths
        if depth is not None and not 1 <= depth <= num_depths:
            raise RefoldError(f"exit_depth: must lie in 1..{num_depths} (got {depth})")
        if forced is not None:
            require_known_tokens("forced", list(forced), self._vocab_size)
            room = len(forced)
            if len(ids) + room > self.max_context:
                raise RefoldError(
                    f"forced: must be at most {self.max_context - len(ids)} tokens after this prompt (got {room})"
                )
        else:
            room = new_tokens_room(len(ids), self.max_context, sampling)
        if len(ids) + room > (most := self._max_tokens):
            raise RefoldError(
                f"memory: pages for the {len(ids) + room} tokens of one prompt and its continuation are required (the "
                f"engine's {self._pools.num_bytes:,} bytes hold {most}); raise memory, or lower max_new_tokens"
            )
        number = next(self._numbers) if index is None else index
        return Request(number, tuple(ids), sampling, room, None if forced is None else tuple(forced))

    def submit(self, request: Request) -> None:
        """Puts a request into the queue.

        Raises:
            RefoldError: The queue is full, the engine is closed, or its attention workers are lost.
        """
        with self._lock:
            if self._is_closed:
                raise RefoldError("engine: an open engine is required (this one is closed); make a new one")
            lost = self._pools.lost_shares()
            if len(lost) == self._pools.num_shares:
                raise RefoldError(f"engine: living attention workers are required (got: {next(iter(lost.values()))})")
            waiting, most = len(self._batcher.scheduler.queue), self.settings.max_queue
            if most is not None and waiting + request.sampling.n > most:
                raise RefoldError(f"max_queue: at most {most} waiting requests are allowed (got {waiting + 1})")
            passes = self._batcher.passes(request.sampling.exit_depth)
            ends = [] if request.forced is not None else self._ends
            first, *request.siblings = [
                Row(
                    request,
                    number,
                    passes,
                    ChoiceText(self.tokenizer, request.prompt_ids, request.sampling, ends, request.max_new_tokens),
                    list(request.prompt_ids),
                )
                for number in range(request.sampling.n)
            ]
            self._batcher.scheduler.add(first)

    def close(self) -> None:
        """Ends all requests, gives up keys and values, and ends the attention workers it has started."""
        with self._lock:
            self._is_closed = True
            self._batcher.cancel()
            self._pools.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cancel(self, request: Request) -> None:
        """Ends a request; its choices keep the text so far. A request that has ended is left as it is."""
        with self._lock:
            self._batcher.cancel(request)

    def step(self) -> list[Request]:
        """Runs one launch and returns the requests that ended."""
        with self._lock:
            ended = self._batcher.step()
            self._done |= {id(request): request for request in ended}
            return ended

    def take(self, request: Request) -> Result:
        """Returns the result of a request that `step` has returned, which the engine then forgets."""
        self._done.pop(id(request), None)
        return request.result()

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended."""
        return self._batcher.has_work

    def statistics(self) -> EngineReport:
        """Returns counts, times and the state of the memory."""
        scheduler = self._batcher.scheduler
        with self._lock:
            return EngineReport(
                self._batcher.statistics,
                self._pools.used_pages,
                self._pools.free_pages,
                self._pools.num_bytes,
                self._count_weights(),
                self._pools.keeper.traffic,
                len(scheduler.queue),
                len(scheduler.running),
                scheduler.num_preemptions,
                scheduler.longest_wait,
                0.0 if self._drafter is None else self._drafter.acceptance,
            )

    def describe(self) -> str:
        """Returns a line about the weights, the memory and what runs less than the full depth."""
        pages, size = self._pools.settings.num_pages, self.settings.page_size
        told = [f"weights {_megabytes(self._count_weights())}"]
        if self._pools.groups:
            told.append(f"keys and values {_megabytes(self._pools.num_bytes)} ({pages:,} pages of {size} tokens)")
        told.append(f"{self.settings.max_rows} rows, {self.max_context:,} tokens each at most")
        if self.settings.exits is not None:
            told.append(f"exits, kv {self.kv}")
        if self.settings.drafts is not None:
            told.append(f"drafts by {self.settings.drafts.source}")
        return "engine: " + "; ".join(told)

    def _count_weights(self) -> int:
        if self.weights is None:
            return sum(each.nbytes for each in self.model.parameters())
        return self.weights.stack + self.weights.head + self.weights.embedding + self.weights.others

    def _encode(self, prompt: AnyPrompt, chat: bool) -> list[int]:
        if not isinstance(prompt, str) and all(isinstance(each, int) for each in prompt):
            ids = [int(cast("int", each)) for each in prompt]
            if not ids:
                raise RefoldError("prompt: at least one token is required (got none)")
        else:
            if self.tokenizer is None:
                raise RefoldError("prompt: token ids are required, because the engine has no tokenizer (got a text)")
            ids = encode_prompt(self.tokenizer, cast("Any", prompt), chat or not isinstance(prompt, str))
        require_known_tokens("prompt", ids, self._vocab_size)
        if len(ids) >= self.max_context:
            raise RefoldError(
                f"prompt: must be at most {self.max_context - 1} tokens, so that one more fits the context of "
                f"{self.max_context} (got {len(ids)}); shorten it"
            )
        return ids


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"


_UNBOUNDED = 1 << 20
"""Context of stacks that keep states alone, which no position limits."""


def _listed(prompts: Any) -> list[AnyPrompt]:
    """Returns one prompt as a list of one, and several as they are."""
    if isinstance(prompts, str):
        return [prompts]
    given = list(prompts)
    if given and all(isinstance(each, int) for each in given):
        return [given]
    if given and all(isinstance(each, dict) for each in given):
        return [given]
    return given


def _find_tokenizer(model: Any) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer of a folder or hub id; None if it has none."""
    source = model if isinstance(model, Source) else locate(model)
    return load_tokenizer(source) if offers_tokenizer(source.fetch_companions()) else None


def _exit_rule(model: Any, settings: EngineSettings) -> tuple[ExitRule | None, str | None]:
    """Returns the rule of the exits, and the policy for keys of skipped depths that was asked for, if any."""
    from refold.engine.thresholds import load_thresholds

    if settings.exits is None or isinstance(settings.exits, ExitRule):
        return settings.exits, settings.kv
    thresholds = load_thresholds(model, settings.exits)
    wanted = cast("KvPolicy", settings.kv or thresholds.kv)
    thresholds.require_policy(wanted)
    return thresholds.rule(), wanted


def _kv_policy(blueprint: Any, wanted: str | None, rule: ExitRule | None) -> KvPolicy:
    """Returns the policy for keys of skipped depths, checked against the stack."""
    if rule is None:
        return cast("KvPolicy", wanted or "recompute")
    first = min((index + 1 for index, depth in enumerate(blueprint.depths) if depth.exit is not None), default=0)
    last = last_writing_depth(blueprint)
    policy = cast("KvPolicy", wanted or ("recompute" if last >= first else "shared"))
    if policy == "shared" and last >= first:
        raise RefoldError(
            f"kv: no keys and states behind the first exit are required for 'shared' (depth {last} keeps some); use "
            f"'recompute' or 'propagate', or fold with share_kv"
        )
    recurrent = [index for index in recurrent_depths(blueprint) if index >= first]
    if policy == "propagate" and recurrent:
        raise RefoldError(
            f"kv: attention behind the first exit is required for 'propagate' (depth {recurrent[0]} keeps a state); "
            f"use 'recompute'"
        )
    return policy


def _draft_depth(blueprint: Any, settings: EngineSettings) -> int:
    """Returns the number of depths that draft; 0 for looked-up text."""
    drafts = settings.drafts
    assert drafts is not None
    if drafts.source == "lookup":
        return 0
    if drafts.depth is not None:
        if not 1 <= drafts.depth < blueprint.num_depths:
            raise RefoldError(f"drafts.depth: must lie in 1..{blueprint.num_depths - 1} (got {drafts.depth})")
        return drafts.depth
    exits = [index + 1 for index, depth in enumerate(blueprint.depths) if depth.exit is not None]
    if exits:
        return exits[0]
    passes = find_passes(blueprint)
    if passes.period:
        return passes.start + passes.period
    raise RefoldError(
        "drafts.depth: a depth is required for a stack without exits and loops (got none); give one, or draft by "
        "source='lookup'"
    )
