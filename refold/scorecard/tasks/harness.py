"""lm-eval: its presence, its version, and its messages."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from refold.errors import RefoldError


def require_harness() -> str:
    """Returns lm-eval with its version.

    Raises:
        RefoldError: lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise RefoldError("tasks: lm-eval is required (not installed); `pip install refold[eval]`")
    return f"lm-eval {version('lm_eval')}"


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Keeps bars and warnings of lm-eval off the terminal: refold shows one bar for each set of requests."""
    import lm_eval.api.model
    import lm_eval.api.task

    logger = logging.getLogger("lm_eval")
    level = logger.level
    # No argument of `evaluate` reaches the bars of these modules.
    bars = {module: module.tqdm for module in (lm_eval.api.task, lm_eval.api.model)}
    logger.setLevel(logging.ERROR)
    for module in bars:
        module.tqdm = _no_bar  # type: ignore[assignment]
    try:
        yield
    finally:
        logger.setLevel(level)
        for module, bar in bars.items():
            module.tqdm = bar  # type: ignore[assignment]


def _no_bar(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items
