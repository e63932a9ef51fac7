import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from refold.checkpoint import hub
from refold.checkpoint.companions import check_companions
from refold.checkpoint.folder import AtomicFolder
from refold.checkpoint.headers import read_header_bytes
from refold.checkpoint.locate import FolderSource, is_same_source, locate
from refold.checkpoint.manifest import write_manifest
from refold.errors import FolderError, SourceError


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked:
        def __init__(self, hub_id: str, revision: str | None) -> None:
            raise SourceError(f"asked the hub for {hub_id} at {revision}")

    monkeypatch.setattr(hub, "HubSource", Asked)


def fill(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.ones(3)}, folder / "model.safetensors")


def test_a_folder_gives_config_headers_and_itself(tmp_path: Path) -> None:
    fill(tmp_path)
    source = locate(str(tmp_path))
    assert (source.path, source.hub_id, source.revision) == (tmp_path, None, None)
    assert source.where == str(tmp_path)
    assert source.read_config() == {"model_type": "llama"}
    headers = source.headers()
    assert headers is not None
    assert headers.tensors["a"].shape == (3,)
    assert source.fetch() == tmp_path


def test_a_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "org" / "name")
    fill(tmp_path / "org" / "name@main")
    monkeypatch.chdir(tmp_path)
    assert isinstance(locate("org/name"), FolderSource)
    assert isinstance(locate("org/name@main"), FolderSource)
    with pytest.raises(SourceError, match="asked the hub for org/other at None"):
        locate("org/other")
    with pytest.raises(SourceError, match=r"asked the hub for org/name-1.5_b at refs/pr/1"):
        locate("org/name-1.5_b@refs/pr/1")


@pytest.mark.parametrize(
    "text", ["./a/b", "../b", "/no/such", "~/no-such", "gpt2", "a/b/c", "a b/c", "a/b@", "a/b@c d", "a/", "-a/b"]
)
def test_what_is_no_folder_and_no_id_never_asks_the_hub(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"a GGUF file or hub id org/name\[@revision\] is required \(no such folder"):
        locate(text)


def test_a_path_object_never_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="no such folder"):
        locate(Path("org/name"))


def test_files_and_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").touch()
    with pytest.raises(
        SourceError, match=r"x\.bin: a model folder is required \(got a file\); give the folder it lies in"
    ):
        locate(str(tmp_path / "x.bin"))
    with pytest.raises(SourceError, match=r"x\.gguf: a folder, a GGUF file or hub id .* \(no such folder or file\)"):
        locate("x.gguf")
    (tmp_path / "x.gguf").touch()
    with pytest.raises(SourceError, match=r"x\.gguf: truncated"):
        locate(str(tmp_path / "x.gguf"))
    with pytest.raises(SourceError, match=r"source: a folder or a hub id .* is required .got nothing"):
        locate("")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/model").path == tmp_path / "model"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config\.json is required \(missing\)"),
        (b"{", r"config\.json: JSON is required"),
        (b"\xff\xfe", r"config\.json: JSON is required"),
        (b"[]", r"config\.json: a JSON object is required \(got list\)"),
    ],
)
def test_bad_configs(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        locate(tmp_path).read_config()


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(SourceError, match=r"config\.json: cannot be read"):
        locate(tmp_path).read_config()
    with pytest.raises(SourceError, match="a readable folder is required"):
        FolderSource(tmp_path / "gone").names()


def test_a_config_alone_is_enough_when_asked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    source = locate(tmp_path)
    assert source.headers(config_only=True) is None
    assert source.fingerprint() == {"config_sha256": hashlib.sha256(b"{}").hexdigest(), "index_sha256": None}
    with pytest.raises(SourceError, match="got no weights"):
        source.headers()


def test_the_fingerprint_tells_configs_and_checkpoints_apart(tmp_path: Path) -> None:
    fill(tmp_path)
    first = locate(tmp_path).fingerprint()
    header, _ = read_header_bytes(tmp_path / "model.safetensors")
    assert first["index_sha256"] == hashlib.sha256(header).hexdigest()
    assert first["config_sha256"] == hashlib.sha256((tmp_path / "config.json").read_bytes()).hexdigest()
    (tmp_path / "model.safetensors").rename(tmp_path / "m-1.safetensors")
    index = json.dumps({"weight_map": {"a": "m-1.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert locate(tmp_path).fingerprint() == {**first, "index_sha256": hashlib.sha256(index.encode()).hexdigest()}


def test_a_torn_refold_folder_is_refused(tmp_path: Path) -> None:
    with AtomicFolder(tmp_path / "out") as out:
        fill(out.path)
    (tmp_path / "out").rename(tmp_path / ".out.old")
    assert locate(tmp_path / "out").path == tmp_path / "out"
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(FolderError, match=r"model\.safetensors \(missing\)"):
        locate(tmp_path / "out")


def test_planning_a_folder_imports_nothing_heavy(tmp_path: Path) -> None:
    fill(tmp_path)
    code = (
        "import sys\n"
        "from refold.checkpoint import companions, folder, lock, manifest, provenance\n"
        "from refold.checkpoint.locate import locate\n"
        "source = locate(sys.argv[1]); source.read_config(); source.headers(); source.fingerprint()\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'huggingface_hub', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    root = str(Path(hub.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json"])
def test_a_pipe_is_refused_at_once(tmp_path: Path, name: str) -> None:
    fill(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)

    def read() -> None:
        source = locate(tmp_path)
        source.read_config()
        source.headers()
        check_companions(tmp_path)

    with pytest.raises(SourceError, match=r"cannot be read \(not a plain file\)"):
        read()


def test_the_fingerprint_covers_a_sample_of_every_tensor(tmp_path: Path) -> None:
    fill(tmp_path)
    before = locate(tmp_path).fingerprint()
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    after = locate(tmp_path).fingerprint()
    assert {key for key in before if before[key] != after[key]} == {"sample_sha256"}
    assert not is_same_source(before, after)
    # What an older version wrote knows less, and is compared by that.
    assert is_same_source({key: before[key] for key in ("config_sha256", "index_sha256")}, after)


def test_a_manifest_gives_the_fingerprint_the_hashes_of_whole_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100_000)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path)
    before = locate(tmp_path).fingerprint()
    assert before["files_sha256"] == locate(tmp_path).hash_files()
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # outside the sample
    path.write_bytes(bytes(data))
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 10))
    after = locate(tmp_path)
    assert after.fingerprint()["sample_sha256"] == before["sample_sha256"]
    assert "files_sha256" not in after.fingerprint()
    assert after.hash_files() != before["files_sha256"]
