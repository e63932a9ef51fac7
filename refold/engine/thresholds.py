"""Calibrated thresholds of early exits, kept as `exits.json` beside the model that they were measured for."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import PreTrainedModel

from refold.checkpoint.atomic_file import require_free, write_json
from refold.checkpoint.manifest import EXITS_NAME
from refold.engine.confidence import Measure, compares_exits
from refold.engine.exits import ExitRule
from refold.engine.settings import KvPolicy
from refold.errors import FolderError, RefoldError
from refold.generation.state import fingerprint

_Share = Annotated[float, Field(ge=0, le=1)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ExitThreshold(_Record):
    """The threshold of one exit, with its measured effect on the calibration text."""

    depths: Annotated[int, Field(ge=1)]
    """Number of depths before the exit."""
    threshold: _Share | None
    """Confidence from which on a token leaves; None: no token leaves here."""
    leaves: _Share
    """Share of tokens that leave here, as a mean over documents."""
    differs: _Share
    """Share of tokens that leave here with another token than that of the full depth, likewise."""
    bound: _Share | None
    """Upper bound on that share, or with propagated keys on the share of all differing tokens; None: no token leaves
    here."""


class LiveShares(_Record):
    """Shares measured while the engine generates along the greedy continuations of the full depth."""

    documents: int
    """Number of prompts."""
    tokens: int
    """Number of new tokens."""
    leaves: _Share
    """Share of tokens that leave early, as a mean over prompts."""
    differs: _Share
    """Share of tokens that differ from the full depth's, likewise."""


class ToleranceLevel(_Record):
    """Thresholds of all exits for one tolerance."""

    tolerance: Annotated[float, Field(gt=0, lt=1)]
    """Largest share of differing tokens, as a mean over documents."""
    exits: tuple[ExitThreshold, ...]
    """First to last."""
    skewed: _Share = 0
    """Share of tokens that run the full depth and differ, because they read propagated keys."""
    live: LiveShares | None
    """The check in the engine; None: no threshold to check, or no check was wanted."""

    @property
    def leaves(self) -> float:
        """Share of tokens that leave early."""
        return math.fsum(each.leaves for each in self.exits)

    @property
    def differs(self) -> float:
        """Share of tokens that differ from the full depth's."""
        return math.fsum([*(each.differs for each in self.exits), self.skewed])


class Thresholds(_Record):
    """Thresholds of all exits of one model, for one tolerance or several.

    For each tolerance by itself: with probability `confidence` over the calibration documents, at most the share
    `tolerance` of the tokens of such documents differs from the likeliest token at full depth.
    """

    format: Literal[2] = 2
    measure: Measure
    """Measure of confidence."""
    kv: KvPolicy
    """Keys and values of skipped depths for which the thresholds were measured."""
    tolerance: float
    """The tolerance that is taken where nobody asks for another."""
    confidence: Annotated[float, Field(gt=0, lt=1)]
    """Probability with which each tolerance is kept."""
    levels: Annotated[tuple[ToleranceLevel, ...], Field(min_length=1)]
    """Smallest tolerance first."""
    documents: int
    """Number of documents of the calibration."""
    tokens: int
    """Number of their tokens."""
    context: int
    """Most tokens of one document that were read."""
    corpus: str
    """sha256 of the tokens of all documents."""
    model: str
    """Fingerprint of the model's weights and blueprint, which does not depend on a wider dtype in memory."""

    @model_validator(mode="after")
    def _check_levels(self) -> "Thresholds":
        tolerances = [level.tolerance for level in self.levels]
        if tolerances != sorted(set(tolerances)):
            raise ValueError("levels: tolerances from small to large are required")
        if self.tolerance not in tolerances:
            raise ValueError("tolerance: one of the levels' is required")
        return self

    @property
    def level(self) -> ToleranceLevel:
        """The thresholds for `tolerance`."""
        return self.at(self.tolerance)

    def at(self, tolerance: float) -> ToleranceLevel:
        """Returns the thresholds for one of the tolerances."""
        return next(level for level in self.levels if level.tolerance == tolerance)

    def require_model(self, model: PreTrainedModel, where: str = "exits") -> None:
        """Checks that the thresholds were measured for this model.

        Raises:
            RefoldError: They belong to another model, or its weights have changed.
        """
        if model_fingerprint(model) != self.model:
            raise RefoldError(
                f"{where}: thresholds of this model are required (got those of another model, or of this one before "
                f"its weights or their dtype changed); run `refold calibrate` again"
            )

    def require_policy(self, kv: KvPolicy, where: str = "exits") -> None:
        """Checks that the thresholds hold with a policy for the keys and values of skipped depths.

        `shared` and `recompute` compute the same keys and values, so thresholds of one hold for the other.

        Raises:
            RefoldError: They were measured for other keys and values.
        """
        if (kv == "propagate") != (self.kv == "propagate"):
            raise RefoldError(
                f"{where}: thresholds measured with kv {kv} are required (got kv {self.kv}); serve with kv {self.kv}, "
                f"or run `refold calibrate --kv {kv}`"
            )

    def rule(self, tolerance: float | None = None) -> ExitRule:
        """Returns the rule for the engine, for one of the tolerances; None: `tolerance`."""
        level = self.level if tolerance is None else self.at(tolerance)
        return make_rule(self.measure, {each.depths: each.threshold for each in level.exits})

    def write(self, path: str | Path, overwrite: bool = False) -> Path:
        """Writes the thresholds atomically, and returns the file's path.

        Args:
            path: The file, or the model's folder for `exits.json` in it.
            overwrite: Replace older thresholds; other files are never replaced.

        Raises:
            FolderError: The file exists or cannot be written.
        """
        path = require_free_thresholds(path, overwrite)
        content = self.model_dump(mode="json")
        write_json(path, {**content, "sha256": _digest(content)})
        return path


def make_rule(measure: str, limits: Mapping[int, float | None]) -> ExitRule:
    """Returns an exit rule.

    The measure `agreement` compares neighbouring exits, so the engine looks at exits where no token leaves too.

    Args:
        measure: Measure of confidence.
        limits: Number of depths before an exit to its threshold; None: no token leaves there.
    """
    if compares_exits(measure):
        return ExitRule(measure, {depths: math.inf if at is None else at for depths, at in limits.items()})
    return ExitRule(measure, {depths: at for depths, at in limits.items() if at is not None})


def model_fingerprint(model: PreTrainedModel) -> str:
    """Returns the fingerprint that thresholds record: equal for a model as stored and widened to float32."""
    return fingerprint(model, torch.float32)


def require_free_thresholds(path: str | Path, overwrite: bool = False) -> Path:
    """Checks that thresholds can be written to a file, and returns its path; arguments as `Thresholds.write`.

    Raises:
        FolderError: A file exists that must not be replaced.
    """
    path = Path(path).expanduser()
    path = path / EXITS_NAME if path.is_dir() else path
    return require_free(path, "file of exit thresholds", _is_thresholds, overwrite)


def place_of_thresholds(model: str | Path, out: Path | None = None, overwrite: bool = False) -> Path:
    """Returns the file for the thresholds of a model: `exits.json` in its folder, or `out`.

    Raises:
        RefoldError: The model is no local folder and no file is named.
        FolderError: A file exists that must not be replaced.
    """
    folder = Path(model).expanduser()
    if out is None and not folder.is_dir():
        raise RefoldError(f"{model}: a local folder is required, to put {EXITS_NAME} into it (got none); pass --out")
    return require_free_thresholds(folder if out is None else out, overwrite)


def read_thresholds(path: str | Path) -> Thresholds:
    """Reads a file of thresholds, or `exits.json` in a model's folder.

    Raises:
        FolderError: The file is missing, torn or changed, or holds no thresholds.
    """
    path = Path(path).expanduser()
    path = path / EXITS_NAME if path.is_dir() else path
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FolderError(
            f"{path}: a file of exit thresholds is required (no such file); run `refold calibrate` first, or run the "
            f"full depth"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{path}: readable JSON is required ({str(error)[:80]}); calibrate again") from None
    checksum = content.pop("sha256", None) if isinstance(content, dict) else None
    if isinstance(content, dict) and content.get("format", 1) not in (1, 2):
        raise FolderError(
            f"{path}: format 1 or 2 of exit thresholds is required (got {content['format']}); use the refold that "
            f"wrote it"
        )
    try:
        found = Thresholds.model_validate(_to_levels(content))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(key) for key in first["loc"])
        raise FolderError(
            f"{path}: exit thresholds are required ({where + ': ' if where else ''}{first['msg']}); calibrate again"
        ) from None
    if checksum != _digest(content):
        raise FolderError(
            f"{path}: unchanged thresholds are required (their sha256 does not fit); calibrate again, or give "
            f"thresholds of your own to the engine"
        )
    return found


def load_thresholds(model: PreTrainedModel, source: Thresholds | Path | str) -> Thresholds:
    """Returns the thresholds of a model, checked against it.

    Args:
        model: A loaded model.
        source: Thresholds, their file, or `calibrated`: those in the folder that the model was loaded from.

    Raises:
        RefoldError: There are none, or they belong to another model.
        FolderError: The file is missing, torn or changed.
    """
    if isinstance(source, Thresholds):
        source.require_model(model)
        return source
    if source == "calibrated":
        folder = Path(str(model.config._name_or_path or ""))
        if not model.config._name_or_path or not folder.is_dir():
            raise RefoldError(
                f"exits: a model loaded from a folder is required for 'calibrated' (got {str(folder)!r}); give the "
                f"file of its thresholds"
            )
        source = folder
    found = read_thresholds(source)
    found.require_model(model, str(source))
    return found


def load_rule(model: PreTrainedModel, source: Thresholds | Path | str) -> ExitRule:
    """Returns the exit rule of a model; arguments and errors as for `load_thresholds`."""
    return load_thresholds(model, source).rule()


def _is_thresholds(path: Path) -> bool:
    # A torn file is one too, by its name: it must be possible to calibrate again.
    return path.name == EXITS_NAME or _reads(path)


def _reads(path: Path) -> bool:
    try:
        read_thresholds(path)
    except FolderError:
        return False
    return True


def _to_levels(content: Any) -> Any:
    """Returns the content of a file of format 1, which has one tolerance, as that of format 2."""
    if not isinstance(content, dict) or content.get("format", 1) != 1:
        return content
    own = ("exits", "skewed", "live")
    level = {name: content[name] for name in ("tolerance", *own) if name in content}
    return {**{name: value for name, value in content.items() if name not in own}, "format": 2, "levels": [level]}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
