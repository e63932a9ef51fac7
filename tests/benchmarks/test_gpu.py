"""The rehearsal of `make gpu` on the CPU: every part runs, targets are met, a second run reuses results."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The benchmark in this process, where torch is imported already; for calls that run no part."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = import_module("gpu")

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        return module.main()

    return run


QUICK = ("kernels", "compiled")
WHOLE = (*QUICK, "models", "training", "sharded", "engine", "batching")
TIMES = ("Trainer", "continuous batching")
"""Targets on times, which no test asserts: their parts run, and the targets may be missed."""


# Slow; the parts are run by `make gpu DEVICE=cpu`.
@pytest.mark.long
@pytest.mark.parametrize("parts", [QUICK, WHOLE], ids=["quick", "whole"])
def test_the_rehearsal_runs_every_part_once(tmp_path, parts, main):
    work, page = tmp_path / "work", tmp_path / "gpu.md"
    command = ("--device", "cpu", "--work", str(work), "--write", str(page), "--parts", *parts)
    done = bench(*command)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    missed = [
        line
        for line in done.stdout.splitlines()
        if line.startswith("MISSED") and not any(each in line for each in TIMES)
    ]
    assert not missed
    assert all(json.loads((work / f"{part}.json").read_text())["rows"] for part in parts)
    before = {part: (work / f"{part}.json").stat().st_mtime_ns for part in parts}
    (work / "kernels.json").unlink()
    main(*command, "--seconds", "1")
    assert "not run: about" in page.read_text()
    assert all((work / f"{part}.json").stat().st_mtime_ns == before[part] for part in parts if part != "kernels")
    assert not (work / "kernels.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_card_it_says_so_in_one_line(tmp_path, main, capsys):
    assert main("--work", str(tmp_path / "work")) == 2
    assert capsys.readouterr().err.startswith("gpu: a CUDA device is required (got none)")
    assert not (tmp_path / "work").exists()
