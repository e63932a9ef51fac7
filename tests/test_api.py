"""Names of the public API."""

import importlib
import subprocess
import sys

import pytest

import refold

PUBLIC = {
    "analyse", "plan", "convert", "inspect", "heal", "quantise", "evaluate", "calibrate", "generate", "export",
    "run", "bench", "fit", "sweep", "parse_budget", "FitOptions",
    "Recipe", "HealStage", "HealOptions", "RunSettings", "RunOptions", "BenchSettings", "AnalysisSettings", "Reference",
    "CalibrateOptions", "ConvertOptions", "EvaluationSettings", "QuantiseOptions", "Sampling",
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
    for package in ("analysis", "conversion", "healing", "evaluation", "exporting", "generation", "studies"):
        importlib.import_module(f"refold.{package}")
    assert all(
        callable(getattr(refold, name))
        for name in ("analyse", "convert", "heal", "evaluate", "export", "generate", "run")
    )


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'fold'"):
        _ = refold.fold


def test_importing_refold_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, refold; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


WRONG_SETTINGS = """
import sys, refold
from pathlib import Path
path = Path(sys.argv[1])
calls = {
    "EvaluationSettings": lambda: refold.evaluate(path, ["a b c d"], {"context": 64}),
    "ConvertOptions": lambda: refold.convert(path, path / "out", options={"overwrite": True}),
    "CalibrateOptions": lambda: refold.calibrate(path, ["a b c d"], {"tolerance": 0.1}),
    "HealOptions": lambda: refold.heal(path, path / "out", ["a b c d"], [], options={"device": "cpu"}),
    "RunOptions": lambda: refold.run(path, path / "out", data=["a b c d"], options={"device": "cpu"}),
    "AnalysisSettings": lambda: refold.analyse(path, settings={"tokens": 64}),
}
for kind, call in calls.items():
    try:
        call()
    except refold.RefoldError as error:
        assert f"refold.{kind} is required (got dict); give refold.{kind}" in str(error), error
    else:
        raise AssertionError(kind)
"""


def test_settings_of_another_type_are_refused(tmp_path) -> None:
    # In a process of its own: here annotations are checked before refold can say anything.
    subprocess.run([sys.executable, "-c", WRONG_SETTINGS, str(tmp_path)], check=True, timeout=200)
