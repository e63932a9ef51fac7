"""Checkpoints of a run: the newest two are kept, and each is a complete folder or absent."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from refold.checkpoint.atomic_file import write_json
from refold.checkpoint.folder import AtomicFolder, repair
from refold.checkpoint.manifest import verify
from refold.checkpoint.reader import CheckpointReader
from refold.checkpoint.writer import ShardedWriter, count_bytes
from refold.errors import FolderError, HealError
from refold.healing.thaw import ThawState

STATE_NAME = "state.json"
RUN_NAME = "run.json"
NUM_KEPT = 2
_NAME = re.compile(r"step-(\d{9})")


@dataclass(frozen=True)
class RunState:
    """Holds the progress of a run, without its tensors. All fields are plain data and are stored as JSON.

    Attributes:
        stage: number of finished stages.
        step: optimizer steps of the current stage, skipped steps included. It gives learning rate and data position.
        steps_before: steps of the finished stages.
        bad_steps: length of the current run of steps whose loss or gradient was not finite.
        skipped_steps: number of steps in all stages whose loss or gradient was not finite.
        seconds: training time so far.
        thaw: state of the decision to thaw in the current stage.
    """

    stage: int = 0
    step: int = 0
    steps_before: int = 0
    bad_steps: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    thaw: ThawState = field(default_factory=ThawState)

    @property
    def total_steps(self) -> int:
        """Steps of all stages so far."""
        return self.steps_before + self.step

    def next_stage(self) -> "RunState":
        """Returns the state in which the next stage begins."""
        return replace(self, stage=self.stage + 1, step=0, steps_before=self.total_steps, bad_steps=0, thaw=ThawState())

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> "RunState":
        """Makes a state from the mapping that `asdict` returns."""
        return cls(**{**data, "thaw": ThawState(**data["thaw"])})


@dataclass(frozen=True)
class Checkpoints:
    """Writes, finds and reads the checkpoints of one run.

    Attributes:
        folder: the parent folder, with one folder for each step.
        identity: everything the run's result depends on, by name: settings, model, teacher, data. A checkpoint of a
            run with another identity is not resumed.
        tell: called with each line for the user.
    """

    folder: Path
    identity: Mapping[str, Any] = field(default_factory=dict)
    tell: Callable[[str], None] = print

    def claim(self) -> None:
        """Writes the identity of the run beside its checkpoints, and refuses a folder that belongs to another run.

        Raises:
            HealError: the folder has an unfinished run with other settings, model, teacher or data; every difference is
                named.
            FolderError: the identity cannot be written.
        """
        path = self.folder.parent / RUN_NAME
        if path.exists():
            self._require_same_run(json.loads(path.read_text()))
        else:
            write_json(path, self.identity)

    def save(self, state: RunState, tensors: Mapping[str, Tensor]) -> Path:
        """Writes a checkpoint, then removes all checkpoints except the newest two.

        Raises:
            FolderError: the disk is full or cannot be written; earlier checkpoints stay unchanged.
        """
        path = self.folder / f"step-{state.total_steps:09d}"
        specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        with AtomicFolder(path, overwrite=True, needed_bytes=count_bytes(specs)) as out:
            with ShardedWriter(out.path, specs, is_finite=False) as writer:
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
            out.hashes.update(writer.hashes)
            text = json.dumps({"state": asdict(state), "identity": self.identity}, indent=2)
            (out.path / STATE_NAME).write_text(text + "\n")
        for old in self._paths()[NUM_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def newest(self) -> Path | None:
        """Returns the folder of the newest checkpoint, None if there is no checkpoint."""
        return next(iter(self._paths()), None)

    def newest_good(self) -> Path | None:
        """Returns the newest checkpoint that was not written after a bad step, None if there is none."""
        for path in self._paths():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if not json.loads((path / STATE_NAME).read_text())["state"]["bad_steps"]:
                    return path
        return None

    def require_space(self, num_bytes: int) -> None:
        """Checks that the disk has space for the checkpoints of a run; space of present checkpoints counts as free.

        Args:
            num_bytes: Size of one checkpoint.

        Raises:
            FolderError: The disk has too little space.
        """
        wanted, place = (NUM_KEPT + 1) * num_bytes, self.folder.parent
        held = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(place).free
        if free + held < wanted:
            raise FolderError(
                f"{place}: {wanted:,} bytes of disk are required for {NUM_KEPT + 1} checkpoints (free: {free:,}); make "
                f"room or choose another output"
            )

    def load(self) -> tuple[RunState, dict[str, Tensor]] | None:
        """Returns state and tensors of the newest complete checkpoint, None if there is none.

        Raises:
            HealError: the checkpoint belongs to a run with other settings, model, teacher or data; every difference is
                named.
        """
        for path in self._paths():
            try:
                verify(path)
            except FolderError as error:
                self.tell(f"checkpoint {path.name} is torn and skipped ({error})")
                continue
            found = json.loads((path / STATE_NAME).read_text())
            self._require_same_run(found["identity"])
            with CheckpointReader(path) as reader:
                return RunState.read(found["state"]), {name: reader.read(name) for name in reader.names()}
        return None

    def _paths(self) -> list[Path]:
        """Returns the folders of all checkpoints, newest first."""
        if not self.folder.is_dir():
            return []
        for path in self.folder.glob(".step-*"):
            # A killed process can leave an unfinished checkpoint.
            repair(path.with_name(path.name.split(".")[1]))
        return sorted((path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)

    def _require_same_run(self, identity: Mapping[str, Any]) -> None:
        # Through JSON and back, because that is what the checkpoint's went through.
        wanted = json.loads(json.dumps(self.identity))
        names = sorted(name for name in wanted | dict(identity) if wanted.get(name) != identity.get(name))
        if names:
            shown = "; ".join(
                f"{name} was {_short(identity.get(name))}, is {_short(wanted.get(name))}" for name in names
            )
            raise HealError(
                f"{self.folder.parent}: an unfinished run with other settings lies there ({shown}); "
                f"repeat its command to resume it, or pass --restart to drop it"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
