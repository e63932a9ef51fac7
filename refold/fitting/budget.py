"""Budgets of a fit: limits on bytes, cache, FLOPs, latency and loss, as a user writes them and as numbers."""

import re
from typing import NamedTuple

from pydantic import Field

from refold.errors import RefoldError
from refold.families.arch import Frozen
from refold.fitting.menu import QUANTITIES, Costs
from refold.suggest import did_you_mean, shorten

DEFAULT_CONTEXT = 8192


class Limits(NamedTuple):
    """Upper limits of a choice; None: no limit.

    Attributes:
        bytes: Stored bytes.
        cache: Bytes of cache and state of one sequence.
        flops: FLOPs of one token.
        milliseconds: Time of one decoded token.
        loss: Predicted loss in nats per token.
    """

    bytes: float | None = None
    cache: float | None = None
    flops: float | None = None
    milliseconds: float | None = None
    loss: float | None = None


class Limit(Frozen):
    """One limit as written: a share of the source, or an amount."""

    text: str
    """As written, such as `35%`."""
    share: float | None = None
    """Share of the source, such as 0.35."""
    amount: float | None = None
    """Bytes, FLOPs or milliseconds."""

    def of(self, source: float) -> float:
        """Returns the limit as an amount.

        Args:
            source: The amount of the source.
        """
        return self.amount if self.amount is not None else (self.share or 0.0) * source


class Budget(Frozen):
    """The limits of a fit."""

    bytes: Limit | None = None
    """Stored bytes."""
    cache: Limit | None = None
    """Bytes of cache and state of one sequence at the context."""
    flops: Limit | None = None
    """FLOPs of the token that follows the context."""
    latency: Limit | None = None
    """Milliseconds of one decoded token on the device of the table."""
    max_loss: float | None = Field(default=None, ge=0)
    """Most measured loss in nats per token; alone, the fit looks for the fewest bytes."""
    context: int = Field(default=DEFAULT_CONTEXT, ge=1)
    """Tokens at which cache, FLOPs and latency are counted."""

    @property
    def limited(self) -> dict[str, Limit]:
        """The limits by flag."""
        named = {"bytes": self.bytes, "cache": self.cache, "flops": self.flops, "latency": self.latency}
        return {name: limit for name, limit in named.items() if limit is not None}

    def limits(self, source: Costs) -> Limits:
        """Returns the limits as amounts.

        Args:
            source: Costs of the source at two bytes a number, on the device of the table.

        Raises:
            RefoldError: There is nothing to do, or a latency is limited without a table of the device.
        """
        if self.latency is not None and source.milliseconds <= 0:
            raise RefoldError(
                f"--latency: a table of a device is required (got {self.latency.text} without one); measure it by "
                f"refold fit --measure-device device.json, and give --on device.json"
            )
        amounts = {"latency": source.milliseconds, **{name: getattr(source, name) for name in QUANTITIES}}
        found = {name: limit.of(amounts[name]) for name, limit in self.limited.items()}
        if self.max_loss is None and all(found[name] >= amounts[name] for name in found):
            told = ", ".join(
                f"--{name} {limit.text}: the source has {format_quantity(name, amounts[name])} at two bytes a number"
                for name, limit in self.limited.items()
            )
            raise RefoldError(f"budget: a limit below the source is required ({told}); there is nothing to do")
        return Limits(found.get("bytes"), found.get("cache"), found.get("flops"), found.get("latency"), self.max_loss)

    def describe(self) -> str:
        """Returns the budget in words, such as `bytes 35%, cache 25% at 8,192 tokens`."""
        told = []
        for name, limit in self.limited.items():
            at = f" at {self.context:,} tokens" if name != "bytes" else ""
            told.append(f"{name} {limit.text}{at}")
        if self.max_loss is not None:
            told.append(f"loss at most {self.max_loss:g} nats per token")
        return ", ".join(told)


_UNITS = {
    "bytes": {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
    "flops": {"FLOPs": 1.0, "kFLOPs": 1e3, "MFLOPs": 1e6, "GFLOPs": 1e9, "TFLOPs": 1e12},
    "latency": {"us": 1e-3, "ms": 1.0, "s": 1e3},
}
_UNITS["cache"] = _UNITS["bytes"]
_EXAMPLES = {"bytes": "35% or 1.5GB", "cache": "25% or 800MB", "flops": "70% or 12GFLOPs", "latency": "20ms or 50%"}
_WRITTEN = re.compile(r"(?P<number>\d{1,18}(\.\d{1,12})?)\s*(?P<unit>[a-z]{0,8}|%)", re.IGNORECASE | re.ASCII)


def parse_budget(
    bytes: str | None = None,
    cache: str | None = None,
    flops: str | None = None,
    latency: str | None = None,
    max_loss: float | None = None,
    context: int = DEFAULT_CONTEXT,
) -> Budget:
    """Reads a budget.

    Args:
        bytes: Share of the source's bytes at two bytes a number (`35%`), or an amount (`1.5GB`, `300MiB`).
        cache: Share or amount of cache and state at the context.
        flops: Share or amount (`12GFLOPs`) of the FLOPs of one token at the context.
        latency: Milliseconds of one decoded token (`20ms`), or a share of the source's.
        max_loss: Most loss in nats per token.
        context: Tokens at which cache, FLOPs and latency are counted.

    Raises:
        RefoldError: No limit is given, or one cannot be read; the message has the flag.
    """
    written = {"bytes": bytes, "cache": cache, "flops": flops, "latency": latency}
    limits = {name: parse_limit(name, text) for name, text in written.items() if text is not None}
    if max_loss is not None and not 0 < max_loss < float("inf"):
        raise RefoldError(f"--max-loss: a number of nats per token above 0 is required (got {max_loss}); write 0.05")
    if not limits and max_loss is None:
        raise RefoldError("budget: a limit is required (got none); give --bytes 35%, or --max-loss 0.05")
    if context < 1:
        raise RefoldError(f"--context: a number of tokens from 1 is required (got {context}); write --context 8192")
    return Budget(**limits, max_loss=max_loss, context=context)


def parse_limit(name: str, text: str) -> Limit:
    """Reads one limit.

    Args:
        name: `bytes`, `cache`, `flops` or `latency`.
        text: As written, such as `35%` or `1.5GB`.

    Raises:
        RefoldError: The text is not an amount of this quantity, or a share above 0.
    """
    match = _WRITTEN.fullmatch(text.strip())
    if match is None:
        raise RefoldError(f"--{name}: a share or an amount is required (got {shorten(text)}); write {_EXAMPLES[name]}")
    number, unit = float(match["number"]), match["unit"]
    if number <= 0:
        raise RefoldError(f"--{name}: more than 0 is required (got {shorten(text)}); write {_EXAMPLES[name]}")
    if unit == "%":
        return Limit(text=text.strip(), share=number / 100)
    if not unit:
        advice = f"write {text.strip()}% for a share" if number <= 100 else f"write {_EXAMPLES[name]}"
        raise RefoldError(f"--{name}: % or a unit is required (got {shorten(text)}); {advice}")
    units = {known.lower(): factor for known, factor in _UNITS[name].items()}
    if unit.lower() not in units:
        others = [other for other in _EXAMPLES if unit.lower() in {each.lower() for each in _UNITS[other]}]
        hint = f"; did you mean --{others[0]} {text.strip()}?" if others else did_you_mean(unit, _UNITS[name])
        hint = hint or f"; write {_EXAMPLES[name]}"
        raise RefoldError(f"--{name}: must be in %, {', '.join(_UNITS[name])} (got {shorten(text)}){hint}")
    return Limit(text=text.strip(), amount=number * units[unit.lower()])


def format_quantity(name: str, amount: float) -> str:
    """Returns an amount of a quantity with its unit, such as `1.50 GB`, `12.0 GFLOPs`, `20.0 ms` or `0.05 nats`."""
    if name == "loss":
        return f"{amount:.3g} nats"
    if name in ("milliseconds", "latency"):
        return f"{amount:.3g} ms"
    unit = "FLOPs" if name == "flops" else "B"
    for prefix in ("", "k", "M", "G"):
        if abs(amount) < 1000:
            return f"{amount:.0f} {unit}" if not prefix else f"{amount:.3g} {prefix}{unit}"
        amount /= 1000
    return f"{amount:.3g} T{unit}"
