"""Measurements as tables."""

import shlex
from pathlib import Path

from refold.analysis.conclusion import least_important, most_alike
from refold.cli.show import note, print_table
from refold.sources.measurements import Measurements


def print_measurements(found: Measurements, source: str, out: Path | None) -> None:
    """Prints influence by layer, the least important and most alike layers, the loss by tying, and the next command."""
    influence = found.influence
    rows = [
        (str(layer), *(f"{value:.4f}" for value in values))
        for layer, values in enumerate(zip(influence.block, influence.attention, influence.mlp, strict=True))
    ]
    print(f"influence (1 - cosine similarity) on {found.text.tokens:,} tokens of {found.text.name}")
    print_table(("layer", "block", "attention", "MLP"), rows)
    for said in found.notes:
        print(f"- {said}")
    for name, layers in least_important(influence).items():
        print(f"least important, {name}: layers {', '.join(map(str, layers))}")
    pairs = (f"{one} and {other} ({distance:.3f})" for distance, one, other in most_alike(found.similarity))
    print(f"most similar weights (0: equal, 1: nothing in common): layers {', '.join(pairs)}")
    if found.spectra:
        print()
        _print_spectra(found)
    place = shlex.quote(str(out)) if out else "DIR"
    if out:
        note(f"written: {out} (open {out / 'index.html'})")
    else:
        note("nothing was written: give --out DIR to keep the measurements, with figures")
    note(f"next: refold plan {shlex.quote(source)} --recipe pruned --measurements {place}")


def _print_spectra(found: Measurements) -> None:
    shares = found.spectra[0].shares
    columns = ("tying", "lost", *(f"kept at rank 1/{round(1 / share)}" for share in shares))
    rows = []
    for spectra in found.spectra:
        linears = list(spectra.linears.values())
        lost = sum(each.lost for each in linears)
        kept = [sum(each.lost * each.kept[index] for each in linears) / (lost or 1.0) for index in range(len(shares))]
        shown = (f"{lost / len(linears):.1%}", *(f"{share:.1%}" for share in kept))
        rows.append((f"{spectra.pattern}, {spectra.loops} loops", *shown))
    print_table(columns, rows, "energy of the weights lost by tying, and the share of it that LoRAs would keep")
