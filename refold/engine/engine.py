"""The engine: a model that answers many prompts at once, with exits, drafts and packed weights."""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from refold.blueprint.passes import Passes
from refold.blueprint.schema import Blueprint
from refold.checkpoint.locate import Source
from refold.data.tokens import require_known_tokens
from refold.engine.adapters import NamedAdapters, one_for_each
from refold.engine.batcher import DepthBatcher
from refold.engine.drafts import Drafter
from refold.engine.exits import ExitLevels, ExitRule, LiveExits
from refold.engine.grammars import Grammars
from refold.engine.intake import AnyPrompt, find_tokenizer, list_prompts, read_prompt
from refold.engine.opening import open_model, pack
from refold.engine.report import EngineReport
from refold.engine.resolve import AdapterExits, resolve_adapter_exits, resolve_draft_depth, resolve_exits, resolve_kv
from refold.engine.results import Result
from refold.engine.sampler import Sampler
from refold.engine.sequence import Request
from refold.engine.sequence import Sequence as Row
from refold.engine.settings import EngineSettings, KvPolicy
from refold.engine.sizing import make_pools, max_tokens
from refold.engine.stops import ChoiceText
from refold.engine.threads import set_threads
from refold.errors import RefoldError, given_or_default
from refold.generation.limits import end_tokens, new_tokens_room, position_limit, require_room
from refold.generation.sampling import Sampling
from refold.modeling.load import ModelLike


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
        self.tokenizer = find_tokenizer(model) if tokenizer is None and is_folder else tokenizer
        set_threads(settings.threads)
        opened = open_model(model, device=device)
        # Thresholds name the weights as they are stored, which packing changes.
        self._exits, kv = resolve_exits(opened, settings)
        self._adapters = NamedAdapters(opened, is_folder, is_folder or settings.weights != "auto")
        self.model, self.weights = pack(opened, settings, is_folder)
        self.settings = settings
        self._blueprint = self.model.config.read_blueprint()
        self.kv: KvPolicy = resolve_kv(self._blueprint, kv, self._exits)
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
            depth = resolve_draft_depth(self._blueprint, settings)
            drafter = Drafter(self.model, self._sampler, settings.drafts, depth)
        self._drafter = drafter
        exits = None if self._exits is None else LiveExits(self.model, self._exits.measure)
        self._batcher = DepthBatcher(self.model, self._pools, self._sampler, settings, self.kv, exits, drafter)
        self._ends = end_tokens(self.model, self.tokenizer)
        self._grammars = Grammars(self.tokenizer, self._vocab_size, self._ends)
        self._numbers = count()
        self._done: dict[int, Request] = {}
        self._is_closed = False

    @property
    def blueprint(self) -> Blueprint:
        """The stack."""
        return self._blueprint

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the model knows."""
        return self._vocab_size

    @property
    def max_tokens(self) -> int:
        """Most tokens of one prompt and its continuation that the memory holds."""
        return self._max_tokens

    @property
    def num_pages(self) -> int:
        """Pages of keys and values; 0 where the stack keeps none."""
        return self._pools.settings.num_pages if self._pools.groups else 0

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may ask for, besides the model's own."""
        return self._adapters.names

    def add_adapters(self, name: str, source: str | Path | Source, exits: AdapterExits | None = "calibrated") -> None:
        """Adds the adapters of another fold of the same blocks, which requests then choose by name.

        Rows with different adapters share launches. The tokens are those of an engine on a model after `load_adapters`.

        Args:
            name: A new name.
            source: Folder or hub id, such as the `domain` protocol writes.
            exits: Thresholds of an engine with calibrated exits, which belong to all weights together: those in the
                folder (`calibrated`), their file, or thresholds; None: requests with these adapters run the full depth.

        Raises:
            RefoldError: The name is taken, the model has no adapters, or the thresholds do not fit.
            FolderError: The folder's adapters have other names or shapes, sit on other blocks, or are not finite.
        """
        with self._lock:
            made = self._adapters.make(self.model, self.weights, name, source)
            self._adapters.add(made, resolve_adapter_exits(source, exits, self.settings, self._exits, self.kv))

    @property
    def tolerances(self) -> tuple[float, ...]:
        """Exit tolerances that requests may ask for, smallest first; empty: none but 0, the full depth."""
        return () if self._exits is None else tuple(self._exits.rules)

    @property
    def tolerance(self) -> float | None:
        """Exit tolerance of requests that ask for none; None: the full depth, or exits by a rule without one."""
        return None if self._exits is None else self._exits.tolerance

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
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[Result]:
        """Answers prompts and returns their results in order.

        Args:
            prompts: Texts, lists of token ids, conversations, or one of them.
            sampling: For all of them, or one for each; None: greedy.
            chat: Whether to apply the chat template to texts; to conversations it always applies.
            adapter: Name of the adapters for all of them, or one for each; None: the model's own.

        Raises:
            RefoldError: A prompt is empty, too long or outside the vocabulary, or a setting does not fit; nothing has
                run then.
        """
        return sorted(self.completed(prompts, sampling, chat=chat, adapter=adapter), key=lambda result: result.index)

    def completed(
        self,
        prompts: AnyPrompt | Sequence[AnyPrompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        chat: bool = False,
        adapter: str | Sequence[str | None] | None = None,
    ) -> Iterator[Result]:
        """Answers prompts and yields results in the order of completion; arguments and errors as for `generate`.

        The call itself raises the errors. Closing the iterator cancels the prompts that have not ended.
        """
        given = list_prompts(prompts)
        settings = [sampling] * len(given) if sampling is None or isinstance(sampling, Sampling) else list(sampling)
        if len(settings) != len(given):
            raise RefoldError(f"sampling: one for each of the {len(given)} prompts is required (got {len(settings)})")
        named = one_for_each(adapter, len(given))
        requests = [
            self.prepare(prompt, each, chat=chat, index=index, adapter=name)
            for index, (prompt, each, name) in enumerate(zip(given, settings, named, strict=True))
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
        adapter: str | None = None,
    ) -> Request:
        """Checks a prompt with its settings and returns a request that `submit` takes.

        Args:
            prompt: The prompt.
            sampling: Settings; None: greedy.
            chat: As for `generate`.
            index: Its number in the result; None: counted.
            forced: Tokens that it goes on with, whatever is predicted.
            adapter: Name of the adapters to run with; None: the model's own.

        Raises:
            RefoldError: As for `generate`.
        """
        adapters = self._adapters.find(adapter)
        sampling = given_or_default(sampling, Sampling, "sampling")
        ids = read_prompt(prompt, self.tokenizer, self._vocab_size, chat)
        require_room(len(ids), self.max_context, sampling, f"the context of {self.max_context}")
        self._sampler.require_fitting(sampling)
        exits = self._choose_exits(sampling, self._exits if adapters is None else self._adapters.exits(adapters))
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
        grammar = None if sampling.constraint is None else self._grammars.compile(sampling.constraint)
        goes_on = None if forced is None else tuple(forced)
        return Request(number, tuple(ids), sampling, room, goes_on, exits=exits, grammar=grammar, adapters=adapters)

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
                dict(Counter(span.segment.depths.start for span in scheduler.spans() if not span.is_through)),
                self._adapters.num_bytes,
            )

    def describe(self) -> str:
        """Returns a line about the weights, the memory and what runs less than the full depth."""
        pages, size = self._pools.settings.num_pages, self.settings.page_size
        told = [f"weights {_megabytes(self._count_weights())}{self._adapters.describe()}"]
        if self._pools.groups:
            told.append(f"keys and values {_megabytes(self._pools.num_bytes)} ({pages:,} pages of {size} tokens)")
        told.append(f"{self.settings.max_rows} rows, {self.max_context:,} tokens each at most")
        if self._exits is not None:
            told.append(f"exits {_describe_exits(self._exits)}, kv {self.kv}")
        if self.settings.drafts is not None:
            told.append(f"drafts by {self.settings.drafts.source}")
        return "engine: " + "; ".join(told)

    def _choose_exits(self, sampling: Sampling, levels: ExitLevels | None) -> ExitRule | None:
        """Returns the rule by which the tokens of a request leave; None: full depth, or the depth it asks for."""
        tolerance = sampling.exit_tolerance
        if tolerance and levels is None:
            why = "drafts, which take the full depth" if self._drafter is not None else "one that runs the full depth"
            raise RefoldError(
                f"exit_tolerance: an engine with exits is required (got {tolerance:g} for {why}); ask for 0, or open "
                f"the engine with exits"
            )
        if levels is None or sampling.exit_depth is not None:
            return None
        return levels.find(tolerance)

    def _count_weights(self) -> int:
        own = sum(each.nbytes for each in self.model.parameters()) if self.weights is None else self.weights.total
        return own + self._adapters.num_bytes


def _describe_exits(exits: ExitLevels) -> str:
    if exits.tolerance is not None:
        return f"at tolerance {exits.tolerance:g}"
    return "by a rule" if exits.own is not None else "off unless asked for"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"


_UNBOUNDED = 1 << 20
"""Context of stacks that keep states alone, which no position limits."""
