"""Writing of a model whose weights are stored as integers: every tensor is rounded, or copied."""

import shutil
from collections.abc import Mapping

import torch

from refold.blueprint.integers import find_scheme
from refold.blueprint.quantisation import with_schemes
from refold.blueprint.schema import Blueprint
from refold.blueprint.tensors import float_tensors, target_tensors
from refold.checkpoint.folder import AtomicFolder
from refold.checkpoint.reader import CheckpointReader
from refold.checkpoint.writer import ShardedWriter
from refold.conversion.progress import StepReport
from refold.conversion.rounding_pass import RoundingPass, RoundingText, read_balanced
from refold.conversion.sequential import FittedTensors
from refold.nn.rounding import Rounded, round_weight

SCRATCH = "rounding"
"""Folder inside the unfinished model folder for moments and rounded weights that several depths run."""


def write_integers(
    reader: CheckpointReader,
    blueprint: Blueprint,
    schemes: Mapping[str, str],
    out: AtomicFolder,
    text: RoundingText | None,
    device: str = "cpu",
    progress: StepReport | None = None,
) -> None:
    """Rounds the weights of a model and writes all its tensors into an unfinished folder.

    Args:
        reader: Reads the model, whose weights are floats.
        blueprint: The model.
        schemes: Scheme of each weight to round.
        out: The folder.
        text: Calibration tokens for rounding with error feedback; None: to the nearest integers.
        device: Device that rounds.
        progress: Called with the steps done and the steps in all.
    """
    made, tensors = with_schemes(blueprint, schemes), list(float_tensors(blueprint))
    specs = {
        each.name: (
            each.shape,
            getattr(torch, each.piece.dtype) if each.piece else reader.read(each.name).dtype,
        )
        for each in target_tensors(made)
    }
    scratch = out.path / SCRATCH
    scratch.mkdir()
    rounding = RoundingPass(blueprint, schemes, reader, FittedTensors(scratch), device)
    steps = len(tensors) + (0 if text is None else rounding.num_steps)

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, steps)

    with ShardedWriter(out.path, specs) as writer, torch.inference_mode():
        written: set[str] = set()
        for name, weight in rounding.run(text, tell) if text is not None else ():
            _write(writer, name, weight, schemes[name])
            written.add(name)
        before = 0 if text is None else rounding.num_steps
        for place, tensor in enumerate(tensors, start=1):
            if tensor.name not in schemes:
                writer.write(tensor.name, reader.read(tensor.name))
            elif tensor.name not in written:
                value = read_balanced(tensor.name, schemes, lambda name: reader.read(name, torch.float32))
                scheme = find_scheme(schemes[tensor.name])
                rounded = round_weight(value, scheme, torch.ones(value.shape[1]))
                _write(writer, tensor.name, rounded, schemes[tensor.name])
            tell(before + place)
    shutil.rmtree(scratch)
    out.hashes.update(writer.hashes)


def _write(writer: ShardedWriter, name: str, weight: Rounded, scheme: str) -> None:
    for suffix, value in weight.store(find_scheme(scheme)).items():
        writer.write(f"{name}{suffix}", value)
