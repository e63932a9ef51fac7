"""The journeys of the architecture page stay short: files in which a function runs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_journey_runs_through_more_files_than_it_may() -> None:
    # In a process of its own, where no shape checks run and nothing has been imported.
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "journeys.py")],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count(" files (at most ") == 3
