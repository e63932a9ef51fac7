"""All export targets by their name, the value of `--to`."""

from collections.abc import Mapping

from refold.errors import ExportError
from refold.exporting.target import ExportTarget
from refold.exporting.targets.dense import DENSE
from refold.exporting.targets.gguf import GGUF
from refold.exporting.targets.gguf_lora import GGUF_LORA
from refold.exporting.targets.hub import HUB
from refold.exporting.targets.nanbeige import NANBEIGE_FOLDER
from refold.exporting.targets.nemotron_nas import NEMOTRON_NAS
from refold.exporting.targets.onnx import ONNX
from refold.exporting.targets.peft import PEFT
from refold.suggest import must_be_one_of

ALL = (
    DENSE,
    GGUF,
    GGUF_LORA,
    NANBEIGE_FOLDER,
    NEMOTRON_NAS,
    ONNX,
    HUB,
    PEFT,
)
TARGETS: Mapping[str, ExportTarget] = {target.name: target for target in ALL}


def find_target(name: str) -> ExportTarget:
    """Returns an export target.

    Raises:
        ExportError: There is no target of that name.
    """
    if name not in TARGETS:
        raise ExportError(f"export: to: {must_be_one_of(name, TARGETS)}")
    return TARGETS[name]


def targets_for(engine: str) -> list[ExportTarget]:
    """Returns the targets that an engine reads, or the target of that name.

    Raises:
        ExportError: There is no such engine or target.
    """
    found = [target for target in TARGETS.values() if engine == target.name or engine in target.engines]
    if not found:
        engines = sorted({each for target in TARGETS.values() for each in (*target.engines, target.name)})
        raise ExportError(f"export: for: {must_be_one_of(engine, engines)}")
    return found
