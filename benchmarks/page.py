"""Results pages with command, machine, results and targets."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Target:
    """A target of a benchmark."""

    says: str
    measured: str
    met: bool


@dataclass
class Page:
    """A page whose sections are printed when they are added."""

    title: str
    seed: int
    facts: Mapping[str, str] | None = None
    """Of an earlier run; None: of this one."""
    targets: list[Target] = field(default_factory=list)
    load_before: float = field(default_factory=lambda: os.getloadavg()[0])
    _sections: list[str] = field(default_factory=list)

    def section(self, title: str, text: str) -> None:
        self._sections.append(f"## {title}\n\n{text}\n")
        print(self._sections[-1], flush=True)

    def sections(self, more: Sequence[str] = ()) -> list[str]:
        """Returns all sections as text, after those of an earlier run have been added."""
        self._sections += more
        return list(self._sections)

    def target(self, says: str, measured: str, met: bool) -> None:
        self.targets.append(Target(says, measured, met))

    def text(self) -> str:
        """The whole page as Markdown."""
        rows = [[target.says, target.measured, "yes" if target.met else "**no**"] for target in self.targets]
        known = run_facts(self.seed, self.load_before) if self.facts is None else self.facts
        facts = [[name, value] for name, value in known.items()]
        parts = [
            f"# {self.title}\n",
            f"Written by the command below; [benchmarks](../../benchmarks/README.md) says how.\n\n"
            f"{table(['', 'this run'], facts)}\n",
            f"## Targets\n\n{table(['target', 'measured', 'met'], rows)}\n",
            *self._sections,
        ]
        return "\n".join(parts)

    def finish(self, path: Path | None) -> int:
        """Prints the targets, writes the page where a path is given, and returns the number of targets missed."""
        for target in self.targets:
            print(f"{'met   ' if target.met else 'MISSED'}  {target.says}: {target.measured}")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.text())
            print(f"written: {path}")
        return sum(not target.met for target in self.targets)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: first column to the left, the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run_facts(seed: int, load_before: float) -> dict[str, str]:
    """Returns the facts that are needed to repeat the run."""
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return {
        "command": f"`python {shlex.join([_relative(sys.argv[0]), *sys.argv[1:]])}`",
        "seed": str(seed),
        "machine": ", ".join([_processor(), f"{os.cpu_count()} cores", f"{_memory_gib()} GiB", *gpu]),
        "software": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {platform.system()} {platform.release()}",
        "threads": f"{torch.get_num_threads()}, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}",
        "load average before": f"{load_before:.1f}"
        + (" (busy: times and ratios are rough)" if load_before > 1 else ""),
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def commit() -> str:
    """Returns the short hash of the checkout, with a mark if the package or the benchmarks differ from it."""
    head = _git("rev-parse", "--short=10", "HEAD")
    changed = _git("status", "--porcelain", "--", "refold", "benchmarks")
    return f"{head or 'unknown'}{', with uncommitted changes' if changed else ''}"


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else ""


def _relative(script: str) -> str:
    path = Path(script).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
        if names:
            extensions = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in text]
            return " ".join([names[0], *(f"({', '.join(extensions)})" for _ in extensions[:1])])
    return platform.processor() or platform.machine()


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
