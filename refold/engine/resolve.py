"""Settings of an engine that depend on the model: its exits, keys of skipped depths, and the depth that drafts."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from refold.blueprint.passes import find_passes, last_writing_depth, recurrent_depths
from refold.checkpoint.locate import Source
from refold.engine.exits import ExitLevels, ExitRule
from refold.engine.settings import EngineSettings, KvPolicy
from refold.engine.thresholds import Thresholds, load_thresholds
from refold.errors import RefoldError
from refold.modeling.load import load_model

AdapterExits = Thresholds | Path | Literal["calibrated"]
"""Thresholds of further adapters."""


def resolve_exits(model: Any, settings: EngineSettings) -> tuple[ExitLevels | None, str | None]:
    """Returns the rules of the exits, and the policy for keys of skipped depths that was asked for, if any."""
    asked = settings.exit_tolerance
    if settings.exits is None:
        return None, settings.kv
    if isinstance(settings.exits, ExitRule):
        rule = settings.exits
        return ExitLevels(rule.measure, ExitLevels(rule.measure, rule).find(asked)), settings.kv
    thresholds = load_thresholds(model, settings.exits)
    wanted = cast("KvPolicy", settings.kv or thresholds.kv)
    thresholds.require_policy(wanted)
    rules = {level.tolerance: thresholds.rule(level.tolerance) for level in thresholds.levels}
    if asked is not None and 0 < asked < min(rules):
        raise RefoldError(
            f"exit_tolerance: must be 0 or at least {min(rules):g}, the smallest calibrated tolerance (got {asked:g}); "
            f"run `refold calibrate --tolerance {asked:g}`"
        )
    wish = thresholds.tolerance if asked is None else asked
    own = max((tolerance for tolerance in rules if tolerance <= wish), default=None)
    return ExitLevels(thresholds.measure, None if own is None else rules[own], own, rules), wanted


def resolve_adapter_exits(
    source: str | Path | Source,
    exits: AdapterExits | None,
    settings: EngineSettings,
    own: ExitLevels | None,
    kv: KvPolicy,
) -> ExitLevels | None:
    """Returns the rules of the exits for further adapters; None: the engine takes none.

    Args:
        source: Folder or hub id of the adapters.
        exits: Their thresholds; None: full depth.
        settings: Of the engine. A rule without calibration holds for all adapters.
        own: Rules for the model's own adapters.
        kv: Policy for keys of skipped depths.

    Raises:
        RefoldError: The thresholds are of other weights, another measure or another policy.
        FolderError: There are none.
    """
    if own is None or isinstance(settings.exits, ExitRule):
        return own
    if exits is None:
        return ExitLevels(own.measure, None)
    # Thresholds name all weights of a model, so it is loaded for a moment.
    levels, _ = resolve_exits(load_model(source, device="cpu"), replace(settings, exits=exits, kv=kv))
    assert levels is not None
    if levels.measure != own.measure:
        raise RefoldError(
            f"exits: thresholds of the measure {own.measure} are required, as the model has (got {levels.measure}); "
            f"run `refold calibrate --measure {own.measure}` for the adapters"
        )
    return levels


def resolve_kv(blueprint: Any, wanted: str | None, exits: ExitLevels | None) -> KvPolicy:
    """Returns the policy for keys of skipped depths, checked against the stack."""
    if exits is None:
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


def resolve_draft_depth(blueprint: Any, settings: EngineSettings) -> int:
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
