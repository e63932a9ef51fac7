"""Damaged safetensors headers and indexes: read as safetensors reads them, or refused with one line."""

import json
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from refold.checkpoint.headers import read_headers
from refold.errors import RefoldError

EVIL: list[Any] = [
    *(None, True, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, 0.5, "", "F32", "BF16", "x", [], [0], [0, 0], [2, 3]),
    *({}, {"a": 1}, [[]], [2**62, 2**62], [-1, 8], ["0", "8"], "x" * 5000, [1] * 100, {"dtype": "F32"}),
]
INDEX_NAME, SHARD = "model.safetensors.index.json", "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("base") / "model.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0)}
    save_file(tensors, path, {"format": "pt"})
    return path.read_bytes()


def damage_bytes(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data)) if data else 0
        kind = rng.random()
        if kind < 0.5 and data:
            data[place] = rng.randrange(256)
        elif kind < 0.7:
            del data[place : place + rng.randint(1, 20)]
        elif kind < 0.9:
            data[place:place] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 20)))
        else:
            data[:8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63, len(data), 100_000_001)))
    return bytes(data)


def damage_header(raw: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", raw[:8])
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*header, "__metadata__", "new"])
        if isinstance(header.get(name), dict) and header[name] and rng.random() < 0.7:
            header[name][rng.choice([*header[name], "extra"])] = rng.choice(EVIL)
        else:
            header[name] = rng.choice(EVIL)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = rng.choice((b"[" * 200_000, b'{"a":' * 100_000, b"{}", b"[]", b"\xff\xfe", b'{"a":1,"a":2}'))
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def damage_index(folder: Path, raw: bytes, rng: random.Random) -> None:
    (folder / SHARD).write_bytes(raw)
    index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys("abc", SHARD)}
    if rng.random() < 0.5:
        index[rng.choice(["metadata", "weight_map"])] = rng.choice(EVIL)
    else:
        index["weight_map"][rng.choice("abcd")] = rng.choice(
            [*EVIL, "../x.safetensors", "/etc/passwd", "x.safetensors"]
        )
    (folder / INDEX_NAME).write_text(json.dumps(index))


def check_one_line(error: RefoldError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 1500


def fuzz(folder: Path, base: bytes, first: int, count: int) -> int:
    """Reads damaged checkpoints, compares with safetensors, and returns how many were accepted."""
    accepted = 0
    for seed in range(first, first + count):
        rng = random.Random(seed)
        for path in folder.iterdir():
            path.unlink()
        kind = rng.choice((damage_bytes, damage_header, None))
        name = SHARD if kind is None else "model.safetensors"
        if kind is None:
            damage_index(folder, base, rng)
        else:
            (folder / name).write_bytes(kind(base, rng))
        begun = time.monotonic()
        try:
            found = read_headers(folder)
        except RefoldError as error:
            check_one_line(error)
            continue
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
        finally:
            assert time.monotonic() - begun < 20, seed
        assert found is not None
        accepted += 1
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    assert tuple(file.get_slice(key).get_shape()) == found.tensors[key].shape, seed
        except SafetensorError as error:
            raise AssertionError(f"seed {seed}: accepted what safetensors refuses") from error
    return accepted


def test_a_slice_of_damaged_headers_is_read_or_refused(tmp_path: Path, base: bytes) -> None:
    assert 0 < fuzz(tmp_path, base, 0, 150) < 150


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_damaged_headers_are_read_or_refused(tmp_path: Path, base: bytes) -> None:
    assert 0 < fuzz(tmp_path, base, 150, 2000) < 2000


@pytest.mark.parametrize("metadata", [5, [], "x", {"format": 5}])
def test_metadata_that_is_no_map_of_texts_is_refused(tmp_path: Path, base: bytes, metadata: Any) -> None:
    (length,) = struct.unpack("<Q", base[:8])
    header = {**json.loads(base[8 : 8 + length]), "__metadata__": metadata}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + base[8 + length :])
    with pytest.raises(RefoldError, match="__metadata__ of texts is required"):
        read_headers(tmp_path)
