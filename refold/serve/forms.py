"""The forms that requests ask their answers to be held to."""

import threading
from collections import OrderedDict
from typing import Literal, NamedTuple

from refold.errors import RefoldError
from refold.serve.faults import ApiFault, without_paths

FormKind = Literal["json", "schema", "regex", "strings"]
_KEPT = 256
"""Forms that are known to compile."""


class AnswerForm(NamedTuple):
    """The form of an answer.

    Attributes:
        field: The field of the request that asks for it.
        kind: Any JSON object, a JSON schema, a regular expression, or a list of texts.
        text: The schema or list as JSON, or the expression; empty for `json`.
    """

    field: str
    kind: FormKind
    text: str = ""


class FormChecks:
    """Checks each form once, in the thread that asks, before an engine gets it: some take hours to compile."""

    def __init__(self) -> None:
        self._passed: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._lock = threading.Lock()

    def knows(self, form: AnswerForm) -> bool:
        """Says whether a form has passed before."""
        with self._lock:
            return form[1:] in self._passed

    def require(self, form: AnswerForm) -> None:
        """Checks a form, which takes some tenths of a second.

        Raises:
            ApiFault: It does not compile, or only at great cost.
        """
        from refold.engine.grammars import check_constraint
        from refold.generation.constraint import Constraint

        try:
            check_constraint(Constraint(form.kind, form.text))
        except RefoldError as error:
            raise form_fault(form, error) from None
        with self._lock:
            self._passed[form[1:]] = None
            while len(self._passed) > _KEPT:
                self._passed.popitem(last=False)


def form_fault(form: AnswerForm, error: RefoldError) -> ApiFault:
    """Returns the fault of a form, given an error about a constraint."""
    message = without_paths(str(error).partition(":")[2].strip())
    return ApiFault(400, f"{form.field}: {message}", param=form.field, code="bad_form")
