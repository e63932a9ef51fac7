import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from refold.checkpoint.headers import CheckpointHeaders, parse_header, read_header_bytes, read_headers
from refold.checkpoint.reader import CheckpointReader
from refold.errors import SourceError


def write_raw(path: Path, header: object, num_data_bytes: int) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(num_data_bytes))


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, ...] = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def read_some(folder: Path) -> CheckpointHeaders:
    headers = read_headers(folder)
    assert headers is not None
    return headers


def write_sharded(folder: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": torch.ones(1, dtype=torch.bfloat16)}, folder / "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys("ab", "model-00001-of-00002.safetensors") | {"c": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_single_file_gives_what_safetensors_gives(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(3, 4), "y": torch.randn(5).to(torch.bfloat16), "z": torch.tensor(1, dtype=torch.int64)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    headers = read_some(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert set(headers.tensors) == set(tensors)
    for name, tensor in tensors.items():
        info = headers.info(name)
        assert info.shape == tuple(tensor.shape)
        assert info.num_bytes == tensor.nbytes
        assert info.num_elements == tensor.numel()
        assert raw[info.start : info.end] == bytes(tensor.reshape(-1).view(torch.uint8).numpy())
    assert headers.tensors["y"].dtype == "BF16"
    assert headers.files == {"model.safetensors": len(raw)}
    assert headers.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert headers.num_parameters == 18


def test_shards_are_put_together(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    headers = read_some(tmp_path)
    assert headers.tensors["a"].file == "model-00001-of-00002.safetensors"
    assert headers.tensors["c"].file == "model-00002-of-00002.safetensors"
    assert headers.num_bytes == 12 + 16 + 2
    assert len(headers.files) == 2


def test_a_tensor_the_index_forgot_is_still_listed(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["b"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "b" in read_some(tmp_path).tensors


def test_unknown_tensor_is_named_with_a_suggestion(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"model\.norm\.wieght: no such tensor.*did you mean 'model\.norm\.weight'"):
        read_some(tmp_path).info("model.norm.wieght")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"absent: a readable folder is required \(No such file"):
        read_headers(tmp_path / "absent")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match=r"shard model-00002-of-00002\.safetensors is required \(missing\)"):
        read_headers(tmp_path)


def test_shards_without_an_index(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(SourceError, match=r"index\.json is required beside shards \(got model-00001"):
        read_headers(tmp_path, config_only=True)


def test_tensor_in_the_index_but_not_in_its_shard(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file({"a": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(SourceError, match=r"tensor b is required .the index lists it, the shard does not hold it"):
        read_headers(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file({"a": torch.ones(3), "c": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(SourceError, match=r"each tensor is required once .got a in model-00001.* and model-00002"):
        read_headers(tmp_path)


def test_two_checkpoints_in_one_folder(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="one checkpoint is required"):
        read_headers(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
@pytest.mark.parametrize("config_only", [True, False])
def test_pickle_is_refused_with_how_to_convert(tmp_path: Path, name: str, config_only: bool) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02}.")
    with pytest.raises(
        SourceError, match=rf"got pickle: {name}.*AutoModelForCausalLM\.from_pretrained.*save_pretrained"
    ):
        read_headers(tmp_path, config_only=config_only)


def test_no_weights_is_allowed_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert read_headers(tmp_path, config_only=True) is None
    with pytest.raises(SourceError, match=r"model\.safetensors or .*index\.json is required \(got no weights\)"):
        read_headers(tmp_path)


def test_other_safetensors_are_no_fallback(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "adapter.safetensors")
    with pytest.raises(SourceError, match=r"is required \(got adapter\.safetensors\)"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{", "JSON is required"),
        (b"[1]", "a JSON object is required .got list"),
        (b"{}", "a weight_map of tensor names to shards is required"),
        (b'{"weight_map": {"a": "../x.safetensors"}}', "a must name a .safetensors file beside the index"),
        (b'{"weight_map": {"a": "x.bin"}}', "a must name a .safetensors file beside the index"),
    ],
)
def test_bad_index(tmp_path: Path, index: bytes, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(SourceError, match=message):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("header", "num_data_bytes", "message"),
    [
        (b"not json", 0, "JSON is required"),
        (b'{"a": {}, "a": {}}', 0, "JSON is required .a key stands twice"),
        (b"[" * 5000, 0, "JSON is required .nested too deeply"),
        (b"\xff{}", 0, "JSON is required"),
        ([], 0, "a JSON object is required .got list"),
        ({"a": {"dtype": "F32"}}, 0, "tensor a needs dtype, shape and two data_offsets"),
        ({"a": entry(offsets=(0, 8, 9))}, 8, "tensor a needs dtype, shape and two data_offsets"),
        ({"a": entry(shape=(-2,))}, 8, "tensor a needs dtype, shape and two data_offsets"),
        ({"a": entry(dtype="F33")}, 8, "tensor a has an unknown dtype .got F33; did you mean 'F32'"),
        ({"a": entry(shape=(3,))}, 8, r"tensor a of F32 \[3\] requires 12 bytes \(got 8\)"),
        ({"a": entry(offsets=(8, 0))}, 8, r"tensor a of F32 \[2\] requires 8 bytes \(got -8\)"),
        ({"a": entry(dtype="F4", shape=(3,), offsets=(0, 1))}, 1, r"tensor a of F4 \[3\] requires 1\.5 bytes"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "b overlaps the one before: starts at 4, expected 8"),
        ({"a": entry(), "b": entry(offsets=(9, 17))}, 17, "b leaves a gap before it: starts at 9, expected 8"),
        ({"a": entry()}, 7, r"truncated: \d+ bytes are required \(got \d+\)"),
        ({"a": entry()}, 11, "3 too many"),
    ],
)
def test_damaged_header(tmp_path: Path, header: object, num_data_bytes: int, message: str) -> None:
    write_raw(tmp_path / "model.safetensors", header, num_data_bytes)
    with pytest.raises(SourceError, match=rf"model\.safetensors: .*{message}"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", r"truncated: a header is required \(got 0 bytes\)"),
        (struct.pack("<Q", 100) + b"{}", r"truncated: the header needs 108 bytes \(got 10\)"),
        (
            struct.pack("<Q", 2**63) + b"{}",
            r"the header must be at most 100000000 bytes \(got 9223372036854775808\)",
        ),
    ],
)
def test_damaged_length(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(SourceError, match=message):
        read_headers(tmp_path)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(SourceError, match=r"model\.safetensors: cannot be read \(not a plain file\)"):
        read_headers(tmp_path)
    (tmp_path / "model.safetensors.index.json").mkdir()
    with pytest.raises(SourceError, match=r"index\.json: cannot be read \(not a plain file\)"):
        read_headers(tmp_path)


def test_every_cut_is_found(tmp_path: Path) -> None:
    save_file({"x": torch.randn(3)}, tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    for length in range(len(raw)):
        (tmp_path / "model.safetensors").write_bytes(raw[:length])
        with pytest.raises(SourceError):
            read_headers(tmp_path)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_raise_or_are_read_as_safetensors_reads_them(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.safetensors"
    path.unlink(missing_ok=True)
    save_file({"x": torch.arange(6.0).reshape(2, 3), "yy": torch.arange(4, dtype=torch.int16)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["change", "insert", "delete", "digit"])):
            case "change":
                raw[position] = data.draw(st.integers(0, 255))
            case "insert":
                raw.insert(position, data.draw(st.integers(0, 255)))
            case "delete" if len(raw) > 1:
                del raw[position]
            case _:
                raw[position] = ord(data.draw(st.sampled_from('0123456789[]{},:"')))
    path.unlink()
    path.write_bytes(bytes(raw))
    try:
        reader = CheckpointReader(tmp_path)
        tensors = {name: reader.read(name) for name in reader.names()}
    except SourceError:
        return
    with safe_open(path, framework="pt") as reference:
        assert set(tensors) == set(reference.keys())
        for name, tensor in tensors.items():
            assert reader.info(name).shape == tuple(tensor.shape)
            assert bytes(tensor.reshape(-1).view(torch.uint8).numpy()) == bytes(
                raw[reader.info(name).start : reader.info(name).end]
            )


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_raises_or_parses(value: object) -> None:
    raw = json.dumps({"t": value}).encode()
    try:
        infos = parse_header(raw, "f", 8 + len(raw) + 8, where="f")
    except SourceError:
        return
    assert infos["t"].num_bytes == 8


def test_what_we_accept_safetensors_accepts_too(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"a": entry(), "b": entry(dtype="U8", shape=(0,), offsets=(8, 8))}, 8)
    assert set(read_some(tmp_path).tensors) == {"a", "b"}
    header, size = read_header_bytes(tmp_path / "model.safetensors")
    assert size == 8 + len(header) + 8
    with safe_open(tmp_path / "model.safetensors", framework="pt") as reference:
        assert set(reference.keys()) == {"a", "b"}
