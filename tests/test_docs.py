"""The documentation agrees with the code: links, commands, options, code blocks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)#\s]+)[^)]*\)")
COMMAND = re.compile(r"^(?:\$ )?refold (\S+)(.*)$", re.MULTILINE)
OPTION = re.compile(r"(?<!\S)(--[a-z][a-z-]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    import typer.main

    from refold.cli.app import app

    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    for block in re.findall(r"```(?:\w+)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for name, rest in COMMAND.findall(block.replace("\\\n", " ")):
            if name.startswith("-"):
                continue
            assert name in commands, f"{page.name}: refold {name}"
            known = {option for parameter in commands[name].params for option in parameter.opts} | {"--help"}
            assert set(OPTION.findall(rest)) <= known, f"{page.name}: refold {name}{rest}"


@pytest.mark.parametrize("page", [ROOT / "Makefile", *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_that_are_run_can_be_run(page: Path) -> None:
    for name in set(re.findall(r"-m (refold[\w.]*)", page.read_text(encoding="utf-8"))):
        folder = ROOT / name.replace(".", "/")
        assert folder.with_suffix(".py").exists() or (folder / "__main__.py").exists(), f"python -m {name}"


def test_the_recipe_reference_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "docs/make_recipe_reference.py", "--check"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
