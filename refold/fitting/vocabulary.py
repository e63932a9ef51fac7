"""A smaller vocabulary in a fit: the embedding and the head of a menu count only the kept tokens."""

from typing import Any

from refold.conversion.vocabulary import find_kept
from refold.data.readers import DataSource
from refold.fitting.form_costs import matrix_costs
from refold.fitting.menu import MatrixForm, Menu, MenuMatrix
from refold.planning.plan import plan_model
from refold.recipe.load import load_recipe
from refold.sources.source_model import SourceModel

TRIMMED: dict[str, Any] = {"vocabulary": {"keep": "used"}}
"""The recipe of a smaller vocabulary: the tokens that the text uses."""


def trim_menu(menu: Menu, model: SourceModel, text: DataSource, shared: dict[str, Any]) -> Menu:
    """Returns a menu whose embedding and head have only the tokens that a text uses.

    Args:
        menu: The menu as it was measured.
        model: The source.
        text: The text whose tokens are kept.
        shared: Keys of every recipe of the fit, with the section `vocabulary`.

    Raises:
        RecipeError, SourceError, DataError: The tokenizer cannot be cut, or the text uses nothing.
    """
    kept = find_kept(plan_model(model, load_recipe(shared), allow_larger=True), model, text)
    assert kept is not None

    def trimmed(matrix: MenuMatrix) -> MenuMatrix:
        def form(given: MatrixForm) -> MatrixForm:
            counted = matrix_costs(kept.size, matrix.columns, given.scheme, given.rank)
            # Reading a row of the embedding takes no products.
            return given.model_copy(update={"costs": counted if given.costs.flops else counted._replace(flops=0.0)})

        forms = tuple(form(each) for each in matrix.forms)
        return matrix.model_copy(update={"rows": kept.size, "forms": forms})

    return menu.model_copy(update={"outer": tuple(trimmed(matrix) for matrix in menu.outer)})
