import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from refold.checkpoint.gguf import stored
from refold.checkpoint.gguf.block_types import BLOCK_TYPES, QUANTISED
from refold.checkpoint.reader import CheckpointReader
from refold.errors import SourceError

BLOCKS = {block.name: block for block in BLOCK_TYPES.values()}
DUMP = """
import ctypes, json, pathlib, sys
import xllamacpp
library = ctypes.CDLL(str(next(pathlib.Path(xllamacpp.__file__).parent.glob("*.so"))))
folder = pathlib.Path(sys.argv[1])
for name, count in json.loads(sys.argv[2]).items():
    packed, numbers = (folder / f"{name}.packed").read_bytes(), (ctypes.c_float * count)()
    function = "dequantize_row_" + name.lower().replace("_k", "_K")
    getattr(library, function)(packed, numbers, ctypes.c_int64(count))
    (folder / f"{name}.numbers").write_bytes(bytes(numbers))
"""
"""Dequantises files by the functions of llama.cpp, in its own environment."""


@pytest.fixture(scope="session")
def llama_python() -> str:
    """The interpreter of an environment with xllamacpp; skips where none is named."""
    name = os.environ.get("REFOLD_LLAMA_PYTHON")
    if not name:
        pytest.skip("an environment with llama.cpp is required: set REFOLD_LLAMA_PYTHON to its interpreter")
    return name


def random_blocks(name: str, num_blocks: int) -> torch.Tensor:
    """Returns random blocks whose scales are finite: no byte of a 16-bit float has all bits of its exponent set."""
    generator = torch.Generator().manual_seed(3)
    size = num_blocks * BLOCKS[name].num_bytes
    return torch.randint(256, (size,), generator=generator, dtype=torch.uint8) & 0x3B


def test_numbers_are_exactly_those_of_llama_cpp(llama_python: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf dequantises")
    packed = {name: random_blocks(name, 50) for name in sorted(QUANTISED)}
    counts = {name: 50 * BLOCKS[name].num_elements for name in packed}
    for name, raw in packed.items():
        (tmp_path / f"{name}.packed").write_bytes(raw.numpy().tobytes())
    subprocess.run([llama_python, "-c", DUMP, str(tmp_path), json.dumps(counts)], check=True, timeout=240)
    different = []
    for name, raw in packed.items():
        wanted = torch.frombuffer(bytearray((tmp_path / f"{name}.numbers").read_bytes()), dtype=torch.float32)
        found = stored.dequantise(raw[None], name)[0]
        assert wanted.abs().max() > 0
        if not torch.equal(found, wanted):
            different.append((name, float((found - wanted).abs().max() / wanted.abs().max())))
    assert different == []


def test_other_bytes_give_other_numbers() -> None:
    pytest.importorskip("gguf", reason="the package gguf dequantises")
    for name in QUANTISED:
        raw = random_blocks(name, 2)
        assert not torch.equal(stored.dequantise(raw[None], name), stored.dequantise(raw.flip(0)[None], name)), name


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_stored_numbers_are_those_of_the_quantiser(
    name: str, make_source: Callable[..., Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    import gguf

    folder = make_source("qwen2")
    kind = gguf.GGMLQuantizationType[name]
    path = write_gguf(folder, tmp_path / "m.gguf", types={"ffn_up": name})
    tensor = "model.layers.1.mlp.up_proj.weight"
    with CheckpointReader(folder) as original, CheckpointReader(path) as reader:
        exact = original.read(tensor).numpy()
        wanted = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(exact, kind), kind))
        found = reader.read(tensor)
        assert found.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(name, torch.float32)
        torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0)
        assert reader.info(tensor).dtype == name
        assert reader.read(tensor, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("variant", ["llama", "gpt_neox"])
def test_rows_are_those_of_the_whole_tensor(
    variant: str,
    make_source: Callable[..., Path],
    write_gguf: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_gguf(make_source(variant), tmp_path / "m.gguf", types={"attn": "Q8_0"})
    with CheckpointReader(path) as reader:
        whole = {name: reader.read(name) for name in reader.names()}
        monkeypatch.setattr(stored, "CHUNK_ELEMENTS", 100)
        for name, tensor in whole.items():
            assert torch.equal(reader.read_rows(name, 3, 17), tensor[3:17]), name
            assert torch.equal(reader.read(name), tensor), name
        assert reader.unread() == []


def test_a_file_shortened_while_it_is_open_is_named(
    make_source: Callable[..., Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_gguf(make_source("llama"), tmp_path / "m.gguf")
    with CheckpointReader(path) as reader:
        path.unlink()
        with pytest.raises(SourceError, match=r"m.gguf: a readable file is required"):
            reader.read("model.norm.weight")


def test_without_the_package_its_name_is_told(
    make_source: Callable[..., Path],
    write_gguf: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_gguf(make_source("llama"), tmp_path / "m.gguf", types={"ffn_up": "Q8_0"})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with CheckpointReader(path) as reader:
        assert reader.read("model.norm.weight").dtype == torch.float32
        with pytest.raises(SourceError, match=r"Q8_0: the package gguf is required .*pip install 'refold\[gguf\]'"):
            reader.read("model.layers.0.mlp.up_proj.weight")
