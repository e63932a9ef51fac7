"""transformers' own common model tests pass on six kinds of folds.

They come with transformers' source distribution, of which `scripts/fetch_transformers_tests.py` fetches that of the
installed version. `REFOLD_TRANSFORMERS_TESTS` names the folder `tests` of a checkout of that version instead; a source
distribution lacks the tests of generation and of exports, which then do not run.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITE = Path(__file__).with_name("transformers_suite.py")
KINDS = ("strict", "relaxed", "low rank", "retention", "gated delta", "shared keys")


@pytest.fixture(scope="module")
def common_tests() -> Path:
    """The folder of transformers' tests; skips where there is none."""
    if find_spec("parameterized") is None:
        pytest.skip("parameterized is required, which those tests import")
    given = os.environ.get("REFOLD_TRANSFORMERS_TESTS")
    folder = Path(given) if given else ROOT / ".cache" / f"transformers-{version('transformers')}" / "tests"
    if not (folder / "test_modeling_common.py").is_file():
        pytest.skip(
            f"transformers' tests are required (none in {folder}); run scripts/fetch_transformers_tests.py, or set "
            f"REFOLD_TRANSFORMERS_TESTS to the folder `tests` of a checkout"
        )
    return folder


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fold_passes_the_common_model_tests(common_tests: Path, kind: str) -> None:
    settings = {"REFOLD_TRANSFORMERS_TESTS": str(common_tests), "REFOLD_FOLD_KIND": kind, "HF_HUB_OFFLINE": "1"}
    plain = ["-q", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-W", "ignore", "--tb=short"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plain, "--noconftest", str(SUITE)],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= 90, done.stdout[-300:]
