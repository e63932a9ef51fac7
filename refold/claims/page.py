"""The page of a run of the claims, in Markdown."""

from collections.abc import Sequence
from pathlib import Path

from refold.checkpoint.atomic_file import require_free
from refold.claims.record import ArmRecord, ClaimRecord, ClaimsRecord, FindingRecord
from refold.progress import describe_duration

TITLE = "# The papers' claims, measured"
STRANGE = 2.0
"""Bits per byte of a text, over those of the training domain, above which the source hardly knows it."""


def require_page(path: Path, overwrite: bool) -> Path:
    """Checks that the page can be written to a file.

    Raises:
        FolderError: Another file lies there, or a page and `overwrite` is False.
    """
    return require_free(path, "page of `claims`", lambda found: found.read_text("utf-8").startswith(TITLE), overwrite)


def render_claims(record: ClaimsRecord) -> str:
    """Returns the page: verdicts, then every claim with its comparisons, then the models and the method."""
    lines = [
        f"{TITLE} ({record.scale})",
        "",
        f"Source: `{record.source['name']}`. Bits per byte of the source: {_bits(record)}. Lower is better.",
        "",
        *_strangers(record),
        "| claim | verdict | comparisons that hold, fail, are open |",
        "|---|---|---|",
        *(f"| [{claim.name}](#{claim.name}) | **{claim.verdict}** | {_counts(claim)} |" for claim in record.claims),
        "",
    ]
    for claim in record.claims:
        lines += _claim(claim)
    return "\n".join([*lines, *_arms(record), *_method(record), ""])


def _bits(record: ClaimsRecord) -> str:
    return ", ".join(f"{value:.4f} on {name}" for name, value in record.source_bits.items())


def _strangers(record: ClaimsRecord) -> list[str]:
    """Returns a warning about texts that the source itself can hardly predict."""
    first = next(iter(record.source_bits.values()))
    names = [name for name, value in record.source_bits.items() if value > STRANGE * first]
    if not names:
        return []
    return [
        f"The source can hardly predict {', '.join(names)}. A model that stays near its source stays bad there, so a "
        f"comparison that fails on such text alone says little about the claim.",
        "",
    ]


def _counts(claim: ClaimRecord) -> str:
    if claim.why:
        return claim.why
    outcomes = [found.outcome for found in claim.findings]
    return ", ".join(str(outcomes.count(outcome)) for outcome in ("holds", "fails", "open"))


def _claim(claim: ClaimRecord) -> list[str]:
    lines = [f"## {claim.name}", "", claim.statement, "", f"{claim.paper}: {claim.figures}.", ""]
    lines += [claim.note, ""] if claim.note else []
    if claim.why:
        return [*lines, f"**{claim.verdict}**: {claim.why}.", ""]
    lines += [
        f"**{claim.verdict.capitalize()}**.",
        "",
        "| comparison | text | effect | 95% interval | detectable | seeds | documents | outcome |",
        "|---|---|---:|---:|---:|---:|---:|---|",
        *(_finding(found) for found in claim.findings),
        "",
    ]
    readings = _readings(claim.findings)
    if readings:
        lines += ["| model | text | bits per byte | by seed |", "|---|---|---:|---|", *readings, ""]
    return lines


def _finding(found: FindingRecord) -> str:
    documents = str(found.num_documents) if found.num_documents else ""
    effect = f"{found.effect:+.4f}" + (f" ({found.note})" if found.note else "")
    unit = "" if found.unit == "bits per byte" else f" ({found.unit})"
    return (
        f"| {found.comparison}{unit} | {found.domain} | {effect} | {found.low:+.4f} to {found.high:+.4f} "
        f"| {found.detectable:.4f} | {found.num_seeds} | {documents} | {found.outcome} |"
    )


def _readings(findings: Sequence[FindingRecord]) -> list[str]:
    rows = {}
    for found in findings:
        for reading in found.readings:
            each = " / ".join(f"{value:.4f}" for value in reading.by_seed) if len(reading.by_seed) > 1 else ""
            error = "" if reading.error is None else f" ± {reading.error:.4f}"
            rows[reading.name, found.domain] = (
                f"| {reading.name} | {found.domain} | {reading.value:.4f}{error} | {each} |"
            )
    return list(rows.values())


def _arms(record: ClaimsRecord) -> list[str]:
    return [
        "## Models",
        "",
        f"Parameters without embeddings; memory: weights and the cache of {record.memory_tokens:,} tokens. An asterisk "
        "marks a learning rate at the end of those tried.",
        "",
        "| model | tokens | learning rate | tried: validation loss | parameters | MB | MB with cache | FLOPs |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
        *(_arm(arm) for arm in record.arms),
        "",
    ]


def _arm(arm: ArmRecord) -> str:
    rate = "" if arm.rate is None else f"{arm.rate:g}{'*' if arm.is_edge else ''}"
    tried = ", ".join(f"{name}: {'diverged' if loss is None else f'{loss:.4f}'}" for name, loss in arm.rates.items())
    return (
        f"| {arm.name} | {arm.tokens:,} | {rate} | {tried} | {arm.parameters:,} | {arm.weight_bytes / 1e6:.1f} "
        f"| {arm.memory_bytes / 1e6:.1f} | {arm.flops:.2f}x |"
    )


def _method(record: ClaimsRecord) -> list[str]:
    given = record.settings
    return [
        "## Method",
        "",
        f"All trained models of a comparison read the same {given['tokens']:,} tokens (twice as many where one goes on "
        f"from another) with seeds {', '.join(map(str, given['seeds']))}, {given['batch_tokens']:,} a step, context "
        f"{given['context']}. For each, three learning rates were tried on {given['sweep_tokens']:,} tokens, and the "
        f"one with the lowest loss on {given['validation_documents']} validation documents was taken; none of them is "
        f"a test document. Up to {given['documents']} documents of each text, one window of {given['context']} tokens "
        "each, are the test.",
        "",
        "An effect is above zero if the stated order holds. Its standard error adds the variance over seeds and the "
        "paired delta-method variance over documents; intervals are Student's t with Welch-Satterthwaite degrees of "
        "freedom. `holds`: the interval lies above zero. `fails`: it lies below zero, or below the smallest effect "
        "that counts (0.002 bits per byte if nothing else is said). `detectable`: the true effect that would be found "
        "with probability 0.8. Pieces of one book are not independent, so the true error is somewhat larger. A claim "
        "is reproduced if all comparisons hold on all texts, and not reproduced if one fails.",
        "",
        f"Time: {describe_duration(record.seconds / 3600)} of training and measuring. Machine: "
        f"{record.machine.device_name}, {record.machine.cpus} cores, {record.machine.torch_threads} threads; "
        f"{', '.join(f'{name} {version}' for name, version in record.versions.items())}; {record.time[:10]}.",
        *(["", f"    {record.command}"] if record.command else []),
    ]
