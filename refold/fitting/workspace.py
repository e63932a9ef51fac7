"""The folder of a fit: locked, of one source and one text, with everything measured kept so that a fit goes on."""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from refold.checkpoint.atomic_file import is_unfinished, write_json
from refold.checkpoint.lock import FolderLock
from refold.checkpoint.manifest import MANIFEST_NAME, check, is_refold_folder
from refold.checkpoint.source_file import read_file
from refold.errors import FolderError, SourceError
from refold.fitting.front import FIGURE_NAME, PAGE_NAME
from refold.fitting.report import REPORT_NAME, read_report

FIT_NAME = "fit.json"
MODEL_NAME, RECIPE_NAME = "model", "recipe.yaml"


class FitFolder:
    """The folder of a fit.

    `fit.json` names source, texts and settings of the measurements; `measured/` holds moments and the menu;
    `candidates/` the models that were looked at, by a digest of their recipes; `recipe.yaml`, `front.json` and `model/`
    are the result.

    Args:
        root: The folder; it may not exist yet.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.measured = self.root / "measured"
        self.candidates = self.root / "candidates"
        self.model = self.root / MODEL_NAME
        self.recipe = self.root / RECIPE_NAME
        self.report = self.root / REPORT_NAME

    @contextlib.contextmanager
    def claim(self, identity: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[None]:
        """Locks the folder for a fit, and checks that it is new or belongs to the same source, text and settings.

        A budget is no part of the identity: another budget in the same folder uses the former measurements. Its result
        replaces that of the former budget only with `overwrite`.

        Args:
            identity: Source, texts and settings of the measurements, as plain data.
            overwrite: Replace the result of a former fit in this folder.

        Raises:
            FolderError: The folder has other contents, belongs to another fit, or cannot be written.
        """
        if self.root.exists() and not self.root.is_dir():
            raise FolderError(f"{self.root}: a folder's place is required (got a file); choose another output")
        self._check(identity, overwrite)
        try:
            self.measured.mkdir(parents=True, exist_ok=True)
            self.candidates.mkdir(exist_ok=True)
        except OSError as error:
            raise FolderError(
                f"{self.root}: a writable place is required ({error.strerror}); choose another output"
            ) from None
        with FolderLock(self.root):
            if (self.root / FIT_NAME).exists():
                # Another fit may have begun here since the first check.
                self._check(identity, overwrite)
            write_json(self.root / FIT_NAME, dict(identity))
            yield

    def _check(self, identity: Mapping[str, Any], overwrite: bool) -> None:
        """Checks the contents of the folder, as `claim` says."""
        wanted, path = json.loads(json.dumps(dict(identity))), self.root / FIT_NAME
        if path.exists():
            begun = _read_identity(path)
            different = [key for key in sorted({*begun, *wanted}) if begun.get(key) != wanted.get(key)]
            if different:
                raise FolderError(
                    f"{self.root}: a fit of the same source, text and settings is required (other "
                    f"{', '.join(different)} there); choose another output"
                )
        elif self.root.exists() and not all(is_unfinished(each) for each in self.root.iterdir()):
            raise FolderError(
                f"{self.root}: a new folder, or one of an earlier fit, is required (it holds other files); choose "
                f"another output"
            )
        if self.report.exists() and not overwrite:
            raise FolderError(
                f"{self.root}: a place without a finished fit is required ({REPORT_NAME} is there); add --overwrite to "
                f"replace its result with what was measured there, or choose another output"
            )

    def candidate(self, recipe: Mapping[str, Any], name: str) -> Path:
        """Returns the folder of the candidate with a recipe; a new folder has the name in its own."""
        text = json.dumps({**recipe, "description": ""}, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        known = next(self.candidates.glob(f"*-{digest}"), None)
        folder = known or self.candidates / f"{name.replace(' ', '-')}-{digest}"
        folder.mkdir(exist_ok=True)
        return folder

    def budget_recipe(self, name: str) -> Path:
        """Returns the file of the recipe of one budget of a sweep."""
        return self.root / "recipes" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-')}.yaml"

    def discard_result(self) -> None:
        """Deletes the report of a former fit first, so that an interrupted fit is unfinished, then recipes and page."""
        try:
            names = [point.name for point in read_report(self.report).points]
        except FolderError:
            names = []
        files = [self.report, self.recipe, self.root / PAGE_NAME, self.root / FIGURE_NAME]
        for path in (*files, *map(self.budget_recipe, names)):
            path.unlink(missing_ok=True)

    def is_published(self, candidate: Path) -> bool:
        """Tells whether `model/` is the model of a candidate, by the checksums of its files.

        Args:
            candidate: Folder of the candidate.

        Raises:
            FolderError: It is, but a file is missing or has another size.
        """
        made, kept = self.model / MANIFEST_NAME, candidate / MANIFEST_NAME
        if not (made.exists() and kept.exists() and made.read_bytes() == kept.read_bytes()):
            return False
        check(self.model)
        return True

    def publish(self, model: Path) -> None:
        """Moves a finished model to `model/`, in the place of a former result of this fit."""
        self.withdraw()
        model.rename(self.model)

    def withdraw(self) -> None:
        """Deletes the model of a former fit; it is moved first, so that no part of it stays in `model/`.

        Raises:
            FolderError: `model/` is not by refold.
        """
        former = self.candidates / "former"
        shutil.rmtree(former, ignore_errors=True)
        if not self.model.exists():
            return
        if not is_refold_folder(self.model):
            raise FolderError(
                f"{self.model}: a model of `refold fit` is required to be replaced (got another folder); move it away"
            )
        self.model.rename(former)
        shutil.rmtree(former, ignore_errors=True)

    def discard_models(self) -> None:
        """Deletes the models of all candidates; their figures stay."""
        for folder in filter(Path.is_dir, self.candidates.iterdir()):
            for model in folder.iterdir():
                if model.is_dir() and is_refold_folder(model):
                    shutil.rmtree(model)


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_file(path))
    except (SourceError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise FolderError(
            f"{path}: the source, text and settings of a fit are required (the file is damaged); choose another output"
        )
    return found
