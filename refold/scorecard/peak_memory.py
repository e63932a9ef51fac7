"""The peak memory of a model while it generates, measured in a fresh process that holds nothing else."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

import torch

from refold.engine.engine import Engine
from refold.engine.process_memory import forget_peak, read_peak
from refold.engine.settings import EngineSettings
from refold.generation.sampling import Sampling

LONGEST = 900.0
"""Seconds that the process may take."""


@dataclass(frozen=True)
class MemoryQuestion:
    """A model and the text that it generates.

    Attributes:
        model: Folder or hub id.
        weights: Form of the weights, as in `EngineSettings`.
        device: Name of the device.
        prompt: Token ids.
        new_tokens: New tokens.
        threads: CPU threads.
    """

    model: str
    weights: str
    device: str
    prompt: list[int]
    new_tokens: int
    threads: int


@dataclass(frozen=True)
class PeakMemory:
    """The memory of a process with one model, or the reason why it is not known.

    Attributes:
        base: Bytes before the model is loaded: interpreter and libraries.
        peak: Most bytes while the model generates, `base` included.
        why: The reason why there are no bytes; empty if there are.
    """

    base: int | None = None
    peak: int | None = None
    why: str = ""


def measure_peak_memory(question: MemoryQuestion) -> PeakMemory:
    """Runs a model in a fresh process and returns the memory of that process.

    Loading is over when the peak begins to count: a model that is packed needs more memory for a moment.

    Args:
        question: The model and the text.
    """
    command = [sys.executable, "-m", "refold.scorecard.peak_memory"]
    try:
        done = subprocess.run(
            command, input=json.dumps(asdict(question)), capture_output=True, text=True, timeout=LONGEST, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return PeakMemory(why=f"the process that measures it did not end ({type(error).__name__})")
    try:
        return PeakMemory(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        return PeakMemory(why=f"the process that measures it ended with {done.returncode}: {said[0][:200]}")


def _answer(question: MemoryQuestion) -> PeakMemory:
    """Measures this process."""
    device = torch.device(question.device)
    base = forget_peak(device)
    if base is None:
        return PeakMemory(why=f"this system does not tell the peak of a process on {device.type}")
    settings = EngineSettings(
        weights=question.weights,
        max_rows=1,
        max_context=len(question.prompt) + question.new_tokens,
        threads=question.threads,
    )
    with Engine(question.model, settings, device=device) as engine:
        forget_peak(device)
        engine.generate([question.prompt], Sampling(max_new_tokens=question.new_tokens, ignore_eos=True))
        return PeakMemory(base, read_peak(device))


if __name__ == "__main__":
    print(json.dumps(asdict(_answer(MemoryQuestion(**json.load(sys.stdin))))))
