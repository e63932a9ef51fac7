from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refold.checkpoint.gguf.shards import find_gguf, list_shards
from refold.checkpoint.locate import locate
from refold.errors import SourceError


def test_a_single_file_is_its_own_shard(tmp_path: Path) -> None:
    assert list_shards(tmp_path / "m.gguf") == [tmp_path / "m.gguf"]


def test_one_model_of_several_files_is_found(tmp_path: Path) -> None:
    names = ["README.md", "m-00002-of-00002.gguf", "m-00001-of-00002.gguf"]
    assert find_gguf(tmp_path, names) == tmp_path / "m-00001-of-00002.gguf"
    assert find_gguf(tmp_path, ["README.md"]) is None


def test_several_models_must_be_told_apart(tmp_path: Path) -> None:
    for name in ("m-Q4_0.gguf", "m-Q8_0.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(
        SourceError, match=r"one GGUF model is required \(got m-Q4_0.gguf, m-Q8_0.gguf\); name the file"
    ):
        locate(tmp_path)


@pytest.fixture
def split(make_source: Callable[..., Path], write_gguf: Callable[..., Path], tmp_path: Path) -> list[Path]:
    write_gguf(make_source("llama"), tmp_path / "m.gguf", split=15)
    return sorted(tmp_path.iterdir())


def test_a_missing_shard_is_named(split: list[Path]) -> None:
    split[1].unlink()
    with pytest.raises(SourceError, match=r"shard m-00002-of-00003.gguf is required \(missing\)"):
        locate(split[0])


def test_a_later_shard_names_the_first(split: list[Path]) -> None:
    with pytest.raises(
        SourceError, match=r"the first of the files is required \(got number 3\); give .*m-00001-of-00003"
    ):
        locate(split[2])


def test_exchanged_shards_are_refused(split: list[Path]) -> None:
    raw = split[1].read_bytes()
    split[1].write_bytes(split[2].read_bytes())
    split[2].write_bytes(raw)
    with pytest.raises(SourceError, match=r"m-00002-of-00003.gguf: metadata split.no: 1 is required \(got 2\)"):
        locate(split[0])


def test_a_renamed_first_shard_is_not_a_whole_model(split: list[Path]) -> None:
    alone = split[0].parent / "alone.gguf"
    split[0].rename(alone)
    with pytest.raises(SourceError, match=r"39 tensors are required by split.tensors.count \(got 15\); complete"):
        locate(alone)


def test_a_tensor_in_two_shards_is_refused(
    make_source: Callable[..., Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    def number(place: int) -> Callable[[Any], None]:
        def edit(writer: Any) -> None:
            writer.add_uint16("split.no", place)
            writer.add_uint16("split.count", 2)

        return edit

    for place in (0, 1):
        path = tmp_path / f"whole-{place}.gguf"
        write_gguf(make_source("llama"), path, edit=number(place))
        path.rename(tmp_path / f"m-0000{place + 1}-of-00002.gguf")
    with pytest.raises(
        SourceError, match=r"each tensor is required once \(got .* in m-00001-of-00002.gguf and m-00002"
    ):
        locate(tmp_path)
