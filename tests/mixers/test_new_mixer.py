"""A new mixer needs two files and an entry in each of two tables; an incomplete one is refused before it runs."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "refold"
OPTIONS = '''"""A decaying mean of the values."""

from typing import Literal

from refold.families.arch import ArchSpec
from refold.mixers.heads import HeadedSpec
from refold.mixers.spec import Shape


class Toy(HeadedSpec):
    """Replaces attention by a toy."""

    url = "https://arxiv.org/abs/1706.03762"

    type: Literal["toy"] = "toy"
    norm: Literal["none"] = "none"
    gate: Literal["silu", "none"] = "none"
    """Gate on the output."""
    offset: bool = True
    """Whether a vector is added to the values."""

    def linears(self, arch: ArchSpec) -> dict[str, tuple[int, int]]:
        gate = {} if self.gate == "none" else {"g_proj": (self.layout.value_width, arch.hidden_size)}
        return super().linears(arch) | gate

    def vectors(self, arch: ArchSpec) -> dict[str, Shape]:
        return super().vectors(arch) | ({"D": (self.layout.heads,)} if self.offset else {})
'''
MODULE = '''"""A decaying mean of the values."""

import math

import torch
from torch import Tensor

from refold.nn.mixers.headed import HeadedMixer
from refold.ops import scalar_decay
from refold.ops.choice import run


class ToyMixer(HeadedMixer):
    """A toy."""

    def mix(self, reads, state, resets, lora, vectors) -> tuple[Tensor, Tensor]:
        query, key = self.widen(reads.query) * self.query_scale, self.widen(reads.key)
        value = self.widen(reads.value)
        decay = torch.full((self.layout.heads,), math.log(0.9), device=query.device)
        value = value + self.vector("D", vectors).unsqueeze(-1)
        return run(scalar_decay, query, key, value, decay, state=state, resets=resets)
'''
USE = """
import json, sys
import torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from refold.blueprint.schema import Blueprint
from refold.blueprint.tensors import target_tensors
from refold.conversion.convert import ConvertOptions, convert
from refold.modeling.load import load_model

torch.manual_seed(0)
config = LlamaConfig(vocab_size=24, hidden_size=16, intermediate_size=20, num_attention_heads=4,
                     num_key_value_heads=2, num_hidden_layers=4, initializer_range=0.3, max_position_embeddings=64)
LlamaForCausalLM(config).save_pretrained("source")
recipe = {"mixers": [{"type": "toy", "gate": "silu", "except": [0], "transfer": "all"}], "fold": {"loops": 2},
          "relax": {"rank": 2, "vectors": "own"}}
plan = convert("source", "folded", recipe, options=ConvertOptions(allow_larger=True))
assert {part.mixer.type for part in plan.blueprint.mixers} == {"attention", "toy"}
stored = json.loads(Path("folded/config.json").read_text())["blueprint"]
assert Blueprint.model_validate(stored) == plan.blueprint
model = load_model("folded")
assert {name: tuple(each.shape) for name, each in model.state_dict().items()} == {
    tensor.name: tensor.shape for tensor in target_tensors(plan.blueprint)}
tokens = torch.arange(9)[None] % 24
out = model.generate(tokens, max_new_tokens=4, do_sample=False)
assert out.shape == (1, 13)
again = model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False)
assert torch.equal(out, again)
before = model(tokens).logits
model.save_pretrained("again")
assert torch.equal(load_model("again")(tokens).logits, before)
with torch.no_grad():
    for part in model.model.mixers:
        if hasattr(part, "g_proj"):
            part.g_proj.weight.zero_()
assert not torch.equal(model(tokens).logits, before)
print("ok")
"""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package in a folder of its own, to be changed, with the compiled modules, which would take long to make."""
    shutil.copytree(ROOT, tmp_path / "refold", ignore=shutil.ignore_patterns("shipped"))
    return tmp_path


@pytest.fixture
def add(copied: Path) -> Callable[..., None]:
    """Adds the parts of a new mixer: its files, and its entry (import and name) in a table."""

    def enter(path: Path, after: str, line: str, imported: str) -> None:
        text = path.read_text()
        assert text.count(after) == 1
        first = text.index("from refold.mixers.spec" if "nn" not in path.parts else "from refold.nn.mixers.retention")
        text = text[:first] + imported + "\n" + text[first:]
        path.write_text(text.replace(after, f"{after}{line}\n"))

    def make(*parts: str) -> None:
        mixers, modules = copied / "refold" / "mixers", copied / "refold" / "nn" / "mixers"
        for part in parts:
            if part == "options":
                (mixers / "toy.py").write_text(OPTIONS)
            elif part == "module":
                (modules / "toy.py").write_text(MODULE)
            elif part == "entry":
                enter(
                    mixers / "registry.py",
                    "        LinearAttention,\n",
                    "        Toy,",
                    "from refold.mixers.toy import Toy",
                )
            else:
                after = '    "linear_attention": LinearAttentionMixer,\n'
                imported = "from refold.nn.mixers.toy import ToyMixer"
                enter(modules / "registry.py", after, '    "toy": ToyMixer,', imported)

    return make


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )


def plan(folder: Path, command: Sequence[str] = ("plan", "source")) -> subprocess.CompletedProcess[str]:
    """Runs a command with the new mixer, on a source that is no more than a config where nothing else is there."""
    source = folder / "source"
    if not source.exists():
        shutil.copytree(ROOT / "shipped" / "stdlib-5m", source)
    (folder / "toy.yaml").write_text("mixers: [{type: toy}]\n")
    return run(folder, "-m", "refold", *command, "--recipe", "toy.yaml", "--allow-larger")


def count_added(before: Path, after: Path) -> int:
    """Counts the lines of a table that were not there; none may be missing."""
    old, new = before.read_text().splitlines(), after.read_text().splitlines()
    assert [line for line in new if line in old] == old
    return len(new) - len(old)


def test_two_files_and_an_entry_in_each_table_make_a_mixer(copied: Path, add: Callable[..., None]) -> None:
    add("options", "module", "entry", "module entry")
    new = {path.relative_to(copied) for path in (copied / "refold").rglob("*.py")}
    old = {path.relative_to(ROOT.parent) for path in ROOT.rglob("*.py")}
    assert new - old == {Path("refold/mixers/toy.py"), Path("refold/nn/mixers/toy.py")}
    for table in ("mixers/registry.py", "nn/mixers/registry.py"):
        assert count_added(ROOT / table, copied / "refold" / table) == 2  # its import and its name
    used = run(copied, "-c", USE)
    assert used.stdout.strip() == "ok", used.stderr[-2000:]
    planned = plan(copied)
    assert planned.returncode == 0, planned.stderr


def test_a_mixer_without_a_module_is_neither_planned_nor_converted(copied: Path, add: Callable[..., None]) -> None:
    add("options", "entry")
    for command in (("plan", "source"), ("convert", "source", "folded")):
        done = plan(copied, command)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert "toy" in done.stderr
        if command[0] == "plan":
            assert "there is no refold/nn/mixers/toy.py" in done.stderr
    assert not (copied / "folded").exists()
    imported = run(copied, "-c", "import refold.modeling.model")
    assert "mixers: toy: an entry in refold/nn/mixers/registry.py is required" in imported.stderr


@pytest.mark.long
def test_a_module_that_is_not_entered_is_not_converted(copied: Path, add: Callable[..., None]) -> None:
    add("options", "entry", "module")
    done = plan(copied, ("convert", "source", "folded"))
    assert done.returncode == 2, done.stderr
    assert "mixers: toy: an entry in refold/nn/mixers/registry.py is required" in done.stderr
    assert not (copied / "folded").exists()


def test_a_module_without_options_is_refused(copied: Path, add: Callable[..., None]) -> None:
    add("module", "module entry")
    imported = run(copied, "-c", "import refold.modeling.model")
    assert "mixers: toy: an entry in refold/mixers/registry.py is required" in imported.stderr
