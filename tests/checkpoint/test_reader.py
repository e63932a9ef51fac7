import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from refold.checkpoint.folder import AtomicFolder
from refold.checkpoint.reader import CheckpointReader
from refold.errors import FolderError, SourceError


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    tensors = {"a": torch.randn(4, 3), "b": torch.randn(5).to(torch.bfloat16), "c": torch.randn(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


def test_tensors_are_read_by_name_and_accounted_for(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with CheckpointReader(tmp_path) as reader:
        assert set(reader.names()) == set(reader.unread()) == set(tensors)
        assert torch.equal(reader.read("a"), tensors["a"])
        assert reader.read("b").dtype == torch.bfloat16
        assert set(reader.unread()) == {"c"}
        assert torch.equal(reader.read("b", torch.float32), tensors["b"].float())
        assert torch.equal(reader.read_rows("a", 1, 3), tensors["a"][1:3])
        kept = reader.read_rows("c", 0, 1, torch.float64)
        assert reader.unread() == []
    assert kept.dtype == torch.float64
    assert kept[0] == tensors["c"][0]


def test_unknown_names_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    reader = CheckpointReader(tmp_path)
    for read in (reader.read, reader.info, lambda name: reader.read_rows(name, 0, 1)):
        with pytest.raises(SourceError, match="d: no such tensor in the checkpoint"):
            read("d")


def test_a_file_damaged_after_opening_is_named(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    for read in (lambda reader: reader.read("a"), lambda reader: reader.read_rows("a", 0, 1)):
        reader = CheckpointReader(tmp_path)
        content = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(content[:-4])
        with pytest.raises(SourceError, match=r"model\.safetensors: readable safetensors are required"):
            read(reader)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(SourceError, match=r"model\.safetensors: readable safetensors are required"):
            read(reader)
        (tmp_path / "model.safetensors").write_bytes(content)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="got no weights"):
        CheckpointReader(tmp_path)


def test_a_torn_refold_folder_is_refused_and_a_moved_one_restored(tmp_path: Path) -> None:
    with AtomicFolder(tmp_path / "out") as out:
        save_file({"a": torch.ones(3)}, out.path / "model.safetensors")
        (out.path / "config.json").write_text("{}")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    assert CheckpointReader(tmp_path / "out").names() == ["a"]
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(FolderError, match=r"config\.json \(missing\)"):
        CheckpointReader(tmp_path / "out")


def test_reading_takes_no_anonymous_memory(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/status")
    save_file({f"t{number}": torch.ones(8 << 20) for number in range(3)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    before = _anonymous_bytes()
    read = [reader.read(name) for name in reader.names()]
    assert all(float(tensor.sum()) == 8 << 20 for tensor in read)
    assert _anonymous_bytes() - before < 16 << 20
    # The control: a converted tensor is a copy, and the same look sees it.
    converted = reader.read("t0", torch.float64)
    assert _anonymous_bytes() - before >= converted.nbytes


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
