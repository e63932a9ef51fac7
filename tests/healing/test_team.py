"""Several processes that train one model, started by torchrun as a user would."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SETTINGS = ("heal.context=16", "heal.batch_tokens=80", "heal.learning_rate=1e-2")
SMALL = [*(part for setting in SETTINGS for part in ("--set", setting)), "--device", "cpu"]
SMALL += ["--set", "heal.batch_tokens=80"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = (json.dumps({"text": f"{letter} goes to {letter * 9}."}) for letter in "abcdefghijklmnopqrstuvwxyz" * 4)
    path.write_text("\n".join(lines) + "\n")
    return path


def _command(folded: Path, out: Path, text: Path, *more: str) -> list[str]:
    return ["-m", "refold", "heal", str(folded), str(out), "-d", str(text), "-t", "1000", *SMALL, *more]


def _heal(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def alone(folded: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "healed"
    _heal([sys.executable, *_command(folded, out, text)])
    return out


@pytest.mark.parametrize(
    "how", [pytest.param([], id="copies", marks=pytest.mark.long), pytest.param(["--sharded"], id="shards")]
)
def test_two_processes_equal_one_within_rounding(folded, text, alone, tmp_path, weights, how):
    # Five sequences a step: one process has three and the other two, and one of them a pass more.
    done = _heal([*TORCHRUN, *_command(folded, tmp_path / "healed", text, *how)])
    assert done.stdout.count("1,000 tokens") == 1
    assert not list(tmp_path.glob(".*.heal"))
    together, by_itself = weights(tmp_path / "healed"), weights(alone)
    start = weights(folded)
    assert together.keys() == by_itself.keys()
    for name in start:
        mine, other = together[name].float(), by_itself[name].float()
        moved = (start[name].float() - other).abs().max().item()
        assert torch.allclose(mine, other, rtol=2**-7, atol=0.01 * moved), name  # one rounding of bfloat16 on disk
    logs = [(folder / "train.jsonl").read_text().splitlines() for folder in (tmp_path / "healed", alone)]
    for mine, other in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("how", [[], ["--sharded"]], ids=["copies", "shards"])
def test_two_processes_resume_where_one_was_interrupted(folded, text, tmp_path, weights, alone, how):
    out = tmp_path / "healed"
    command = _command(folded, out, text, *how)
    process = subprocess.Popen([*TORCHRUN, *command], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    _wait_for(tmp_path / ".healed.heal" / "train.jsonl", lines=3)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert not out.exists()
    _heal([*TORCHRUN, *command])
    together, by_itself = weights(out), weights(alone)
    assert all(torch.allclose(together[n].float(), by_itself[n].float(), atol=0.02) for n in by_itself)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_process_that_is_killed_ends_the_other_with_an_error(folded, text, tmp_path, victim):
    out = tmp_path / "healed"
    command = _command(folded, out, text, "--set", "heal.batch_tokens=32")
    command[command.index("1000")] = "1000k"
    port = str(29600 + os.getpid() % 1000 + victim)
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, *command],
                env={**ENVIRONMENT, **place, "MASTER_PORT": port},
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
        )
    try:
        _wait_for(tmp_path / ".healed.heal" / "train.jsonl", lines=3)
        ranks[victim].kill()
        _, told = ranks[1 - victim].communicate(timeout=60)
    finally:
        for process in ranks:
            process.kill()
    assert ranks[1 - victim].returncode == 2, told
    assert "all processes of the run are required (one of them ended" in told
    assert "Traceback" not in told
    assert not out.exists()


def _wait_for(log: Path, lines: int) -> None:
    until = time.monotonic() + 100
    while not log.exists() or len(log.read_text().splitlines()) < lines:
        assert time.monotonic() < until, "the run did not begin"
        time.sleep(0.2)
