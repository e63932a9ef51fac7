"""Messages between the process that answers HTTP and the process that runs the engine: lines of JSON.

The first process checks everything it can before it sends a job: the prompt has become tokens, its length fits. A
setting that only the engine can check comes back as `Refused`.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from refold.engine.results import PromptLogprob, Reason, TokenLogprob
from refold.generation.sampling import Sampling


class WireMessage(BaseModel):
    """A message; each has a `kind` of its own."""

    # A logarithm of a probability may be -Infinity, which plain JSON has no number for.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Open(WireMessage):
    """The first message to an engine of its own process: what to open, and how."""

    kind: Literal["open"] = "open"
    model: str
    """Folder or hub id."""
    adapters: dict[str, str] = {}
    """Name to the folder or hub id of other adapters of the same blocks."""
    weights: str = "auto"
    """As for the settings of an engine, like all that follows; None: their default."""
    memory: int | None = None
    max_rows: int | None = None
    max_context: int | None = None
    threads: int | None = None
    device: str | None = None
    tolerance: float | None = None
    """Tolerance of exits where a request asks for none; None: the full depth."""
    is_lossless: bool = False
    """Whether an exit, or the first loop, drafts."""
    log_level: str = "info"


class GenerationJob(WireMessage):
    """A prompt to answer."""

    kind: Literal["job"] = "job"
    id: int
    """Number of the job, never used twice."""
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    adapter: str | None = None
    """Name of the adapters it runs with; None: the model's own."""
    wants_tokens: bool = False
    """Whether pieces tell each token; without, pieces without text are dropped."""


class Cancel(WireMessage):
    """Ends a job; one that has ended is left as it is."""

    kind: Literal["cancel"] = "cancel"
    id: int


class StopEngine(WireMessage):
    """Ends all jobs and the process."""

    kind: Literal["stop"] = "stop"


class EngineFacts(WireMessage):
    """The first message of an engine: what it is."""

    kind: Literal["facts"] = "facts"
    line: str
    """One line about weights, memory and what runs less than the full depth."""
    num_depths: int
    exit_depths: tuple[int, ...] = ()
    """Number of depths before each exit that tokens may leave at."""
    tolerances: tuple[float, ...] = ()
    """Exit tolerances that a request may ask for, smallest first."""
    tolerance: float | None = None
    """The one that is taken where a request asks for none; None: the full depth."""
    max_context: int
    """Most tokens of a prompt and its continuation."""
    max_tokens: int
    """Most tokens that the engine's memory holds for one prompt."""
    max_rows: int
    """Most sequences that run at once."""
    vocab_size: int
    num_pages: int
    """Pages of keys and values; 0: the stack keeps none."""
    page_size: int
    """Tokens of a page."""
    weight_bytes: int
    memory_bytes: int
    """Bytes of all pages and states."""
    parameters: int
    adapters: tuple[str, ...] = ()
    """Names of other adapters of the same blocks."""


class Fault(WireMessage):
    """The last message of an engine that cannot be opened, or that fails."""

    kind: Literal["fault"] = "fault"
    error: str
    """Name of the exception's class."""
    message: str
    """One line for the user who starts the server; it may hold paths, so no client gets it."""


class TokenPart(WireMessage):
    """One new token."""

    token: int
    depth: int
    """Number of depths that computed it."""
    logprob: float | None = None
    alternatives: tuple[TokenLogprob, ...] | None = None


class TextPart(WireMessage):
    """The text and token that one step adds to one choice of a job."""

    kind: Literal["part"] = "part"
    id: int
    choice: int
    text: str
    token: TokenPart | None = None
    """None where the job does not want tokens, and at an end without a token."""
    reason: Reason | None = None
    """Why the choice has ended; None while it goes on."""
    error: str | None = None
    """The fault in one sentence, where that is the reason."""


class ChoiceEnd(WireMessage):
    """How one choice ended."""

    reason: Reason
    num_tokens: int
    """New tokens, without an end token."""
    stop: str | int | None = None
    """The stop string or the end token it ended with."""
    error: str | None = None
    """The fault in one sentence."""
    depths: dict[int, int] = {}
    """Number of depths to the number of new tokens that ran so many."""


class Ended(WireMessage):
    """The last message of a job that was not refused."""

    kind: Literal["ended"] = "ended"
    id: int
    choices: tuple[ChoiceEnd, ...]
    cached_tokens: int
    """Tokens of the prompt that earlier prompts had computed."""
    seconds: dict[str, float]
    """Times since the engine got the job: `queued`, `first_token`, `finished`."""
    prompt_logprobs: tuple[PromptLogprob | None, ...] | None = None
    """Of each token of the prompt, None for the first; None where none were asked for."""


class Refused(WireMessage):
    """The only message of a job that the engine does not take."""

    kind: Literal["refused"] = "refused"
    id: int
    message: str
    """`setting: what is required (what was given)`."""


class LoopSlots(WireMessage):
    """Sequences that stand before one segment of the stack."""

    first_depth: int
    """First depth of the segment."""
    rows: int


class EngineState(WireMessage):
    """The state of the engine, sent several times a second while it works, and once when it comes to rest."""

    kind: Literal["state"] = "state"
    waiting: int
    running: int
    used_pages: int
    free_pages: int
    new_tokens: int
    """Tokens that came out since the start."""
    launches: int
    depths: dict[int, int]
    """Number of depths to the tokens that left there, since the start."""
    acceptance: float
    """Share of drafted tokens that were accepted."""
    preemptions: int
    slots: tuple[LoopSlots, ...] = ()
    """Running sequences by the segment that they stand before."""
    memory_bytes: int = 0
    """Resident bytes of the process."""


ToEngine = Annotated[Open | GenerationJob | Cancel | StopEngine, Field(discriminator="kind")]
FromEngine = Annotated[EngineFacts | Fault | TextPart | Ended | Refused | EngineState, Field(discriminator="kind")]
_TO: TypeAdapter[ToEngine] = TypeAdapter(ToEngine)
_FROM: TypeAdapter[FromEngine] = TypeAdapter(FromEngine)


def write_line(message: WireMessage) -> bytes:
    """Returns a message as a line."""
    return message.model_dump_json(exclude_none=True).encode() + b"\n"


def read_to_engine(line: bytes) -> Open | GenerationJob | Cancel | StopEngine:
    """Reads a message to an engine."""
    return _TO.validate_json(line)


def read_from_engine(line: bytes) -> EngineFacts | Fault | TextPart | Ended | Refused | EngineState:
    """Reads a message from an engine."""
    return _FROM.validate_json(line)
