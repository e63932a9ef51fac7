"""Fetches the tests that the installed transformers' source distribution has, for `make test-long`.

Without a package index it says so and ends with 0: the tests that need them are then skipped.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache"


def main() -> None:
    """Unpacks the folder `tests` of the installed version into `.cache/transformers-<version>`."""
    name = f"transformers-{version('transformers')}"
    if (CACHE / name).is_dir():
        return
    with tempfile.TemporaryDirectory() as scratch:
        wanted = name.replace("-", "==")
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        done = subprocess.run(
            [*download, "--no-binary", "transformers", "--dest", scratch, wanted], capture_output=True, text=True
        )
        archives = list(Path(scratch).glob("transformers-*.tar.gz"))
        if done.returncode or not archives:
            reason = (done.stderr.strip().splitlines() or ["no archive came"])[-1]
            print(f"{wanted}: its source distribution cannot be fetched ({reason}); its tests are skipped")
            return
        unpacked = Path(scratch) / "unpacked"
        with tarfile.open(archives[0]) as archive:
            inside = [each for each in archive.getmembers() if each.name.startswith(f"{name}/tests/")]
            archive.extractall(unpacked, members=inside, filter="data")
        CACHE.mkdir(exist_ok=True)
        shutil.move(unpacked / name, CACHE / name)


if __name__ == "__main__":
    main()
