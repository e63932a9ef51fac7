"""The record of a run of the claims: one JSON file with every finding and verdict."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from refold.evaluation.result import Machine

CLAIMS_FORMAT = 1
"""Format of the file."""
Outcome = Literal["holds", "fails", "open"]
"""`holds`: the interval lies on the side of the stated order. `fails`: it lies on the other side, or excludes the
smallest effect that counts. `open`: neither."""
ClaimVerdict = Literal["reproduced", "not reproduced", "undecided at this scale", "not run at this scale"]


class ClaimPart(BaseModel):
    """A part of the record."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ReadingRecord(ClaimPart):
    """The value of one reading of an arm."""

    name: str
    value: float
    error: float | None
    """Standard error over seeds and documents."""
    by_seed: tuple[float, ...]


class FindingRecord(ClaimPart):
    """One comparison on one text: an effect that is above zero if the stated order holds."""

    comparison: str
    domain: str
    """Name of the text; empty where there is none."""
    unit: str
    effect: float
    low: float
    """Lower end of the interval."""
    high: float
    error: float
    detectable: float
    """The minimum detectable effect: it would be found with probability 0.8."""
    least: float
    """Smallest effect that counts: an interval below it speaks against the claim."""
    num_seeds: int
    """Number of seeds; 1: no seed changes the models."""
    num_documents: int
    outcome: Outcome
    readings: tuple[ReadingRecord, ...] = ()
    note: str = ""


class ClaimRecord(ClaimPart):
    """One claim, with all that was found about it."""

    name: str
    paper: str
    statement: str
    figures: str
    note: str
    verdict: ClaimVerdict
    why: str = ""
    """Reason for a claim that was not run."""
    findings: tuple[FindingRecord, ...] = ()


class ArmRecord(ClaimPart):
    """One trained or converted model of the claims."""

    name: str
    key: str
    tokens: int
    """Training tokens of one seed, without the search for the learning rate."""
    sweep_tokens: int
    """Training tokens of the search, for one seed."""
    rates: dict[str, float | None]
    """Validation bits per byte by learning rate tried; None where training diverged."""
    rate: float | None
    """The best of them; None: no training."""
    is_edge: bool = False
    """Whether the best rate is the lowest or the highest tried, so that a better one may lie beyond."""
    parameters: int
    weight_bytes: int
    memory_bytes: int
    """Weights, and the cache of one sequence of `memory_tokens` tokens."""
    flops: float
    """FLOPs of a token, as a share of the source's."""


class ClaimsRecord(ClaimPart):
    """A run of the claims."""

    format: int = CLAIMS_FORMAT
    scale: str
    settings: dict[str, Any]
    source: dict[str, Any]
    texts: dict[str, str]
    """Names of the texts by their use."""
    claims: tuple[ClaimRecord, ...]
    arms: tuple[ArmRecord, ...]
    source_bits: dict[str, float]
    """Bits per byte of the source, by domain."""
    memory_tokens: int
    seconds: float
    """Seconds of training and measuring, over all calls that shared the work folder."""
    machine: Machine
    versions: dict[str, str]
    command: str = ""
    time: str
