import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from refold.checkpoint.dtypes import dtype_name, torch_dtype
from refold.checkpoint.headers import read_headers
from refold.checkpoint.reader import CheckpointReader
from refold.checkpoint.writer import ShardedWriter, count_bytes
from refold.errors import FolderError, SourceError

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool]


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("is_reversed", [False, True])
def test_all_dtypes_come_back_bit_for_bit_in_any_order(tmp_path: Path, is_reversed: bool) -> None:
    tensors = {str(dtype): (torch.randn(3, 5) * 4).to(dtype) for dtype in DTYPES + FLOAT8}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "odd": torch.arange(3, dtype=torch.int8)}
    with ShardedWriter(tmp_path, specs_of(tensors)) as writer:
        for name in reversed(tensors) if is_reversed else tensors:
            writer.write(name, tensors[name])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(tensors)
    assert all(same(loaded[name], tensors[name]) for name in tensors)
    assert writer.hashes == {
        "model.safetensors": hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    }
    assert writer.num_bytes == (tmp_path / "model.safetensors").stat().st_size
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    with CheckpointReader(tmp_path) as reader:
        assert all(reader.info(name).start % tensors[name].itemsize == 0 for name in tensors)
        assert min(reader.info(name).start for name in tensors) % 8 == 0


def test_shards_are_filled_in_order_and_indexed(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.randn(25) for number in range(7)} | {"big": torch.randn(100)}
    with ShardedWriter(tmp_path, specs_of(tensors), max_shard_bytes=300) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["t2"] == "model-00001-of-00004.safetensors"
    assert index["weight_map"]["t3"] == "model-00002-of-00004.safetensors"
    assert index["weight_map"]["big"] == "model-00004-of-00004.safetensors"
    assert index["metadata"]["total_size"] == count_bytes(specs_of(tensors)) == 1100
    headers = read_headers(tmp_path)
    assert headers is not None
    assert list(headers.tensors) == list(tensors)
    with CheckpointReader(tmp_path) as reader:
        assert all(same(reader.read(name), tensor) for name, tensor in tensors.items())
    assert set(writer.hashes) == set(headers.files)
    for name, digest in writer.hashes.items():
        assert digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_views_and_transposed_tensors_are_written_as_seen(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    tensors = {"t": base.T, "rows": base[2:4], "columns": base[:, 1:3]}
    with ShardedWriter(tmp_path, specs_of(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.requires_grad_(False))
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_transformers_loads_what_is_written(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    weights = model.state_dict()
    with ShardedWriter(tmp_path, specs_of(weights), max_shard_bytes=20_000) as writer:
        for name, tensor in weights.items():
            writer.write(name, tensor)
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with ShardedWriter(tmp_path, {"a": ((1,), torch.float32)}) as writer:
            writer.write("a", torch.ones(1))
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_tensors_never_written_are_named(tmp_path: Path) -> None:
    specs = dict.fromkeys("abcdefgh", ((1,), torch.float32))
    writer = ShardedWriter(tmp_path, specs)
    writer.write("b", torch.ones(1))
    with pytest.raises(FolderError, match=r"7 tensors were never written: a, c, d, e, f, \.\.\. \(2 more\)"):
        writer.close()


def test_what_is_not_planned_is_refused(tmp_path: Path) -> None:
    with ShardedWriter(tmp_path, {"a": ((2,), torch.float32)}) as writer:
        with pytest.raises(FolderError, match="tensor b has no place"):
            writer.write("b", torch.ones(2))
        with pytest.raises(
            FolderError, match=r"tensor a is required as torch\.float32 \[2\] \(got torch\.float32 \[3\]\)"
        ):
            writer.write("a", torch.ones(3))
        with pytest.raises(
            FolderError, match=r"tensor a is required as torch\.float32 \[2\] \(got torch\.float16 \[2\]\)"
        ):
            writer.write("a", torch.ones(2).half())
        writer.write("a", torch.ones(2))
        with pytest.raises(FolderError, match="tensor a is required once"):
            writer.write("a", torch.ones(2))


def test_an_error_in_the_body_is_not_hidden_by_unwritten_tensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), ShardedWriter(tmp_path, {"a": ((2,), torch.float32)}):
        raise ValueError("mine")
    assert not [name for name in os.listdir("/proc/self/fd") if _is_below(name, tmp_path)]


def _is_below(fd: str, folder: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith(str(folder))
    except OSError:
        return False


def test_a_full_disk_shows_before_any_tensor_is_written(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        specs = {"a": ((1 << 18,), torch.float32), "b": ((1 << 19,), torch.float32)}
        with pytest.raises(
            FolderError, match=r"disk full: \d{7} bytes are required \(free: \d+; No space left on device\)"
        ):
            ShardedWriter(tmp_path, specs, max_shard_bytes=1 << 19)
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, r"disk full: \d+ bytes are required"), (errno.EIO, "a writable folder is required")],
)
def test_a_disk_that_fails_later_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    writer = ShardedWriter(tmp_path, {"a": ((4,), torch.float32)})

    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(FolderError, match=message):
        writer.write("a", torch.ones(4))
    writer.abort()


def test_a_flush_that_fails_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    writer = ShardedWriter(tmp_path, {"a": ((4,), torch.float32)})
    writer.write("a", torch.ones(4))
    with pytest.raises(FolderError, match=r"a writable folder is required .Input/output error"):
        writer.close()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, position: pwrite(fd, data[:7], position))
    tensor = torch.randn(50)
    with ShardedWriter(tmp_path, {"a": ((50,), torch.float32)}) as writer:
        writer.write("a", tensor)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensor)


def test_an_existing_file_or_missing_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(FolderError, match="a writable folder is required"):
            ShardedWriter(folder, {"a": ((1,), torch.float32)})


def test_writing_takes_no_anonymous_memory_beyond_the_tensor(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/status")
    tensor = torch.ones(8 << 20)
    with ShardedWriter(tmp_path, {f"t{number}": (tensor.shape, tensor.dtype) for number in range(4)}) as writer:
        before = _anonymous_bytes()
        for number in range(4):
            writer.write(f"t{number}", tensor)
        assert _anonymous_bytes() - before < tensor.nbytes / 2


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def test_dtype_names_go_both_ways() -> None:
    for dtype in DTYPES + FLOAT8:
        assert torch_dtype(dtype_name(dtype)) is dtype
    with pytest.raises(SourceError, match="dtype F4: a dtype of torch is required"):
        torch_dtype("F4")
