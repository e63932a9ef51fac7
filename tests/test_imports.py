"""Packages import only packages to their right."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "refold"
LAYERS = (
    {"cli"},
    {"fitting", "claims"},
    {"studies"},
    {"serve", "report"},
    {"scorecard"},
    {"engine"},
    {"analysis", "conversion", "healing", "evaluation", "generation", "exporting"},
    {"calibration", "vocabulary"},
    {"data", "scoring"},
    {"planning"},
    {"sources", "plugins"},
    {"modeling"},
    {"checkpoint"},
    {"nn"},
    {"ops", "recipe"},
    {"blueprint"},
    {"mixers"},
    {"families"},
)
EVERYWHERE = {"errors", "fields", "pages", "progress", "suggest", "version", "protocols", "recipes", "shipped"}
DISTRIBUTIONS = {"pydantic_core": "pydantic", "markupsafe": "jinja2", "yaml": "pyyaml", "fla": "flash-linear-attention"}
"""The distribution that a module comes with, where its name is another."""
NOT_INSTALLED = {"vllm", "sglang", "mlx", "mlx_lm", "xllamacpp", "torchao", "langchain_openai", "litellm"}
"""Engines, which have environments of their own, and clients whose tests are skipped where they are absent."""
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


@cache
def imported_modules(path: Path) -> frozenset[str]:
    """The modules a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            found.add(node.module)
    return frozenset(found)


def imported_packages(path: Path) -> set[str]:
    """The sub-packages of refold a file imports."""
    return {name.split(".")[1] for name in imported_modules(path) if name.startswith("refold.")}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_to_the_right(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    if package not in RANK:
        assert package.removesuffix(".py") in EVERYWHERE | {"__init__", "__main__"}, f"{path}: which layer is this?"
        return
    for other in imported_packages(path) - EVERYWHERE - {package}:
        assert RANK[other] > RANK[package], f"{package} may not import {other}"


def test_a_stage_may_not_import_its_neighbour() -> None:
    assert RANK["healing"] == RANK["conversion"]


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["recipes"], ["plan", "--help"], ["fit", "--help"], ["plan", str(ROOT / "shipped" / "stdlib-5m")]],
    ids=lambda arguments: arguments[0] + str(len(arguments)),
)
def test_planning_leaves_torch_and_transformers_out(arguments: list[str]) -> None:
    code = (
        "import sys\nsys.argv = ['refold', *sys.argv[1:]]\nfrom refold.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "loaded = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_extra_is_imported_somewhere() -> None:
    extras = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    modules = {distribution: module for module, distribution in DISTRIBUTIONS.items()}
    text = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py"))
    for extra in extras.keys() - {"dev"}:
        for wanted in extras[extra]:
            name = re.split(r"[<>=!~ \[]", wanted)[0]
            assert re.search(rf"\b{modules.get(name, name.replace('-', '_'))}\b", text), f"{extra}: {name} is not used"


def test_every_imported_module_is_declared() -> None:
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(each for extra in extras.values() for each in extra)]
    declared = {re.split(r"[<>=!~ \[]", each)[0].replace("-", "_") for each in wanted}
    known = sys.stdlib_module_names | NOT_INSTALLED | {"refold", "tests"}
    for path in sorted([*ROOT.rglob("*.py"), *(ROOT.parent / "tests").rglob("*.py")]):
        for name in {each.split(".")[0] for each in imported_modules(path)} - known:
            distribution = DISTRIBUTIONS.get(name, name).replace("-", "_")
            assert distribution in declared, f"{path}: {distribution} is not in pyproject.toml"


def test_relative_imports_are_not_used() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: {ast.dump(node)}"
