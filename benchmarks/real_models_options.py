"""Arguments of the commands of `real_models.py`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from starts import ARMS

from refold.fields import read_amount


def by_kind(given: Sequence[str]) -> dict[str, str]:
    """Returns the texts by kind, of `KIND=TEXT`."""
    return {kind: text for kind, _, text in (each.partition("=") for each in given)}


def arguments(about: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("identity", "measure", "tasks", "heal", "write"):
        each = commands.add_parser(name)
        each.add_argument("--work", type=Path, default=Path("runs/real-models"))
        each.add_argument("--known", type=Path, help="figures of an earlier page, its .json, that are taken over")
        if name == "write":
            each.add_argument("--write", type=Path, help="page to write")
            continue
        each.add_argument("--name", required=True, help="name of the source in the page")
        each.add_argument("--source", required=True)
        each.add_argument("--train", nargs="+", metavar="KIND=TEXT", required=True, help="calibration")
        each.add_argument("--held-out", nargs="+", metavar="KIND=TEXT", required=True)
        each.add_argument("--calibration", nargs="+", help="kinds, or `all`; default: the first and all")
        each.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.6, 0.67, 0.5])
        each.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
        each.add_argument("--tokens", type=read_amount, default=16_384, help="of calibration, or of healing")
        each.add_argument("--moment-tokens", type=read_amount, default=16_384)
        each.add_argument("--documents", type=int, default=12, help="of each held-out kind, spread over it")
        each.add_argument("--characters", type=int, default=1800, help="of each document, its first")
        each.add_argument("--context", type=int, default=512)
        each.add_argument("--dtype", default="float32", help="dtype in which models are evaluated and healed")
        each.add_argument("--device")
        each.add_argument("--minutes", type=float, default=1e9, help="begin nothing further after so many")
    commands.choices["tasks"].add_argument("--task-data", type=Path, required=True)
    commands.choices["tasks"].add_argument("--limit", type=int, default=500)
    commands.choices["heal"].add_argument(
        "--heal-on", nargs="+", metavar="KIND=TEXT", help="texts to heal on, in equal parts; default: those of --train"
    )
    commands.choices["heal"].add_argument("--batch-tokens", type=read_amount, default=4096)
    commands.choices["heal"].add_argument("--rate", type=float, default=1e-4)
    commands.choices["heal"].add_argument("--save-every", type=int, default=10, help="steps between checkpoints")
    given = parser.parse_args()
    for name in ("train", "held_out", "heal_on"):
        if getattr(given, name, None) is not None:
            setattr(given, name, by_kind(getattr(given, name)))
    return given
