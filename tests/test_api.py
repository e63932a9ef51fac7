"""Names of the public API."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import refold

PUBLIC = {
    "analyse", "plan", "convert", "inspect", "heal", "quantise", "evaluate", "calibrate", "generate", "export",
    "run", "bench", "fit", "sweep", "score", "compare", "read_scorecard", "ScoreSettings", "parse_budget", "FitOptions",
    "Recipe", "HealStage", "HealOptions", "RunSettings", "RunOptions", "BenchSettings", "AnalysisSettings", "Reference",
    "CalibrateOptions", "ConvertOptions", "EvaluationSettings", "QuantiseOptions", "Sampling", "Constraint",
    "linear_names", "load_adapters", "load_model", "load_tokenizer", "RefoldError", "Mixture", "from_documents",
    "register_objective", "Engine", "EngineSettings", "Drafts", "StreamingEngine",
    "__version__",
}  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert set(refold.__all__) == PUBLIC
    assert set(dir(refold)) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(refold, name).__doc__


def test_functions_stay_functions_when_their_packages_are_imported() -> None:
    for package in (
        "analysis",
        "conversion",
        "healing",
        "evaluation",
        "exporting",
        "generation",
        "studies",
        "scorecard",
    ):
        importlib.import_module(f"refold.{package}")
    assert all(
        callable(getattr(refold, name))
        for name in ("analyse", "convert", "heal", "evaluate", "export", "generate", "run", "score", "compare")
    )


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'fold'"):
        _ = refold.fold


def test_importing_refold_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, refold; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("EvaluationSettings", lambda path, refold: refold.evaluate(path, ["a b c d"], {"context": 64})),
        ("ConvertOptions", lambda path, refold: refold.convert(path, path / "out", options={"overwrite": True})),
        ("CalibrateOptions", lambda path, refold: refold.calibrate(path, ["a b c d"], {"tolerance": 0.1})),
        ("HealOptions", lambda path, refold: refold.heal(path, path / "out", ["a b"], [], options={"device": "cpu"})),
        ("RunOptions", lambda path, refold: refold.run(path, path / "out", data=["a b"], options={"device": "cpu"})),
        ("AnalysisSettings", lambda path, refold: refold.analyse(path, settings={"tokens": 64})),
    ],
)
def test_settings_of_another_type_are_refused(kind: str, call: Callable[[Path, Any], object], tmp_path: Path) -> None:
    with pytest.raises(refold.RefoldError, match=rf"refold\.{kind} is required \(got dict\); give refold\.{kind}"):
        call(tmp_path, refold)
