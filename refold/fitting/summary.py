"""A choice in words and figures: one sentence about it, and the loss and saving of each class of choice."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from refold.fitting.menu import ChosenPart, Costs, FitChoice, MatrixForm, Menu, MenuMatrix, PartForm, matrix_class
from refold.fitting.report import ClassShare, CostFigures

POOL_NAMES = {"mixer": "attention", "mlp": "MLP"}
MAX_SCHEMES = 4
"""Number of schemes that the sentence names; others are counted together."""


def summarise(choice: FitChoice) -> str:
    """Returns a sentence such as `int3 in 98 matrices, int4 in 60; width in 12 MLPs; 2 MLPs of neighbours tied`."""
    matrices = [form for _, form in _chosen_matrices(choice)]
    schemes = Counter(form.scheme or "floats" for form in matrices)
    named = [f"{name} in {number}" for name, number in schemes.most_common(MAX_SCHEMES)]
    others = len(matrices) - sum(number for _, number in schemes.most_common(MAX_SCHEMES))
    named += [f"others in {others}"] if others else []
    sentences = [f"of {len(matrices)} matrices: {', '.join(named)}"] if matrices else []
    ranks = sorted(form.rank for form in matrices if form.rank is not None)
    if ranks:
        span = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
        sentences.append(f"{span} in {len(ranks)}")
    kinds = Counter((part.form.kind, part.pool) for part in choice.parts if part.form.kind != "whole")
    sentences += [
        f"{kind} in {number} {POOL_NAMES[pool]}{'s' * (number > 1)}" for (kind, pool), number in sorted(kinds.items())
    ]
    ties = Counter(tie.pool for tie, _ in choice.ties)
    sentences += [f"{2 * number} {POOL_NAMES[pool]}s tied in pairs" for pool, number in sorted(ties.items())]
    return "; ".join(sentences)


def share_classes(choice: FitChoice, menu: Menu) -> tuple[ClassShare, ...]:
    """Returns the loss and the saving of each class of choice, the class that saves most bytes first.

    The saving of a part's form is counted with all matrices whole and in floats, and that of a matrix form against the
    matrix of the chosen part form, so the savings add up to the source's costs less the costs of the choice.
    """
    whole = {(part.layer, part.pool): part.forms[0] for part in menu.parts}
    saved: dict[str, list[Costs]] = defaultdict(list)
    for part in choice.parts:
        if part.form.kind != "whole":
            before, after = _part_costs(whole[part.layer, part.pool]), _part_costs(part.form)
            saved[part.form.kind].append(_less(before, after))
    for tie, _ in choice.ties:
        first, second = (_part_costs(whole[layer, tie.pool]) for layer in tie.layers)
        saved["tie"].append(_less(first.plus(second), tie.costs.plus(_sum(map(_float_costs, tie.matrices)))))
    for matrix, form in _chosen_matrices(choice, menu):
        if matrix_class(form) != "none":
            saved[matrix_class(form)].append(_less(_float_costs(matrix), form.costs))
    names = [name for name in {**saved, **choice.losses} if name in saved or choice.losses.get(name)]
    made = [
        ClassShare(
            name=name,
            number=len(saved.get(name, ())),
            loss=choice.losses.get(name, 0.0),
            saved=CostFigures.of(_sum(saved.get(name, ()))),
        )
        for name in names
    ]
    return tuple(sorted(made, key=lambda each: -each.saved.bytes))


def _chosen_matrices(choice: FitChoice, menu: Menu | None = None) -> Iterable[tuple[MenuMatrix, MatrixForm]]:
    """Yields each matrix that is stored, with its chosen form; of outer matrices the menu's, if there is one."""
    for matrices, chosen in (*map(_of_part, choice.parts), *((tie.matrices, forms) for tie, forms in choice.ties)):
        yield from ((matrix, chosen[matrix.name]) for matrix in matrices)
    outer = {} if menu is None else {matrix.name: matrix for matrix in menu.outer}
    for name, form in choice.outer.items():
        yield outer.get(name, MenuMatrix(name=name, forms=(form,))), form


def _of_part(part: ChosenPart) -> tuple[tuple[MenuMatrix, ...], Mapping[str, MatrixForm]]:
    return part.form.matrices, part.matrices


def _part_costs(form: PartForm) -> Costs:
    return form.costs.plus(_sum(map(_float_costs, form.matrices)))


def _float_costs(matrix: MenuMatrix) -> Costs:
    """Returns the costs of a matrix whole and in floats; without this form, those of its form of most bytes."""
    whole = [form for form in matrix.forms if matrix_class(form) == "none"]
    return (whole or [max(matrix.forms, key=lambda form: form.costs.bytes)])[0].costs


def _sum(costs: Iterable[Costs]) -> Costs:
    total = Costs()
    for each in costs:
        total = total.plus(each)
    return total


def _less(one: Costs, two: Costs) -> Costs:
    return Costs(*(first - second for first, second in zip(one, two, strict=True)))
