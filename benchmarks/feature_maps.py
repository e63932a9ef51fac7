"""Distances of feature maps from the source's softmax attention by layer: random, unfitted and fitted maps.

    python benchmarks/feature_maps.py --source MODEL --data TEXT --write PAGE

Maps are fitted to one part of the text and measured on another, as in `refold convert --calibration`. No model is
written.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from page import Page, table

from refold.checkpoint.reader import CheckpointReader
from refold.conversion.map_fitter import FitSettings, MapFitter
from refold.data.readers import open_data
from refold.planning.plan import plan_model
from refold.recipe.load import load_recipe
from refold.sources.pieces import PieceReader
from refold.sources.source_model import SourceModel, read_source_model

RANDOM, LEARNED = ("favor", "dijiang"), ("t2r", "hedgehog")


class Distances(NamedTuple):
    """Total variation distances from the softmax by layer, with the initial map and with the fitted map."""

    start: list[float]
    fitted: list[float]


class Measure:
    """Measures maps of one source on one text."""

    def __init__(self, model: SourceModel, given: argparse.Namespace):
        self._model, self._text = model, open_data(given.data)
        self._settings = FitSettings(steps=given.steps)
        self._seed = given.seed

    def __call__(self, name: str, rank: int, window: int = 0) -> Distances:
        entry: dict[str, Any] = {"type": "linear_attention", "feature_map": name, "features": rank, "window": window}
        if name in LEARNED:
            entry["fit"] = "calibration"
        recipe = load_recipe({"mixers": [entry], "seed": self._seed})
        plan = plan_model(self._model, recipe, allow_larger=True).settle()
        folder = self._model.source.fetch()
        with CheckpointReader(folder) as reader:
            fitter = MapFitter(plan, self._model, PieceReader(self._model, reader), settings=self._settings)
            fitter.run(self._text)
        found = list(fitter.approximation.values())
        fitted = [each.fitted for each in found if each.fitted is not None]
        print(f"{name}, {rank} features, window {window}: done", file=sys.stderr, flush=True)
        return Distances([each.start for each in found], fitted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[16, 64], help="features of each head, from few to many"
    )
    parser.add_argument("--window", type=int, default=16, help="beside the fewest fitted features")
    parser.add_argument("--steps", type=int, default=FitSettings.steps, help="of fitting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="results page to write")
    given = parser.parse_args()
    model = read_source_model(given.source)
    page = Page("How well feature maps approximate attention", given.seed)
    measure = Measure(model, given)
    rows: dict[tuple[str, int, str], list[float]] = {}
    for name in RANDOM + LEARNED:
        for rank in given.ranks:
            found = measure(name, rank)
            rows[name, rank, "as it starts" if found.fitted else "random"] = found.start
            if found.fitted:
                rows[name, rank, "fitted"] = found.fitted
    least = given.ranks[0]
    rows["hedgehog", least, f"fitted, beside a window of {given.window}"] = measure(
        "hedgehog", least, given.window
    ).fitted
    settings = FitSettings()
    page.section(
        "Distance by layer",
        f"Total variation distance, 1/2 sum |p - q|, between the attention weights of `{Path(given.source).name}` and "
        f"the map's, mean over heads and {settings.held_out_sequences * settings.sequence_length:,} held-out tokens: 0 "
        "is the source's softmax, 1 has nothing in common with it. Fitted on "
        f"{settings.fit_sequences * settings.sequence_length:,} tokens of text in {given.steps} steps; heads of "
        f"{model.arch.head_dim}. Where nothing is fitted, held-out tokens are drawn from all of the text, else from "
        "its last part.\n\n"
        + table(
            ["map, features", *(f"layer {index}" for index in range(model.arch.num_layers))],
            [[f"{name}, {rank}, {how}", *(f"{x:.3f}" for x in row)] for (name, rank, how), row in rows.items()],
        ),
    )
    judge(page, rows, given.ranks)
    return 1 if page.finish(given.write) else 0


def judge(page: Page, rows: dict[tuple[str, int, str], list[float]], ranks: list[int]) -> None:
    """Checks the targets of the table."""

    def is_nearer(says: str, one: tuple[str, int, str], other: tuple[str, int, str]) -> None:
        ratios = [a / b for a, b in zip(rows[one], rows[other], strict=True)]
        page.target(f"{says}, in every layer", f"{min(ratios):.2f} to {max(ratios):.2f} of it", max(ratios) < 1)

    for rank in ranks:
        for name in LEARNED:
            fitted = (name, rank, "fitted")
            is_nearer(f"{name}, {rank}: fitted nearer than as it starts", fitted, (name, rank, "as it starts"))
            for random in RANDOM:
                is_nearer(f"{name}, {rank}: fitted nearer than {random}", fitted, (random, rank, "random"))
    for few, many in pairwise(ranks):
        is_nearer(f"favor: {many} features nearer than {few}", ("favor", many, "random"), ("favor", few, "random"))


if __name__ == "__main__":
    sys.exit(main())
