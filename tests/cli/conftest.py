"""The model that ships with refold, and the command line in this process."""

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from refold.cli import main


class Done(NamedTuple):
    """One command's exit status and output."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def shipped() -> Path:
    from refold.studies.shipped import shipped_model

    return shipped_model()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs the command line in this process."""

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["refold", *map(str, arguments)])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                status = int(stop.code or 0)
        return Done(status, out.getvalue(), err.getvalue())

    return run
