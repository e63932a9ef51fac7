"""Errors for folders that are no model name the kind of folder and the way to a model."""

import json
from pathlib import Path

import pytest

from refold.checkpoint.locate import locate
from refold.checkpoint.other_folders import explain_missing_config
from refold.errors import SourceError


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            ("adapter_config.json", "adapter_model.safetensors"),
            r"got an adapter of PEFT for org/base\); load",
        ),
        (("summary.json", "folded/model/x"), r"got a folder of `refold run`\); give the model in it: .*folded/model$"),
        (("measurements.json", "index.html"), r"got measurements of `refold analyse`\); .*--measurements"),
        (("model_index.json", "unet/config.json"), r"got a pipeline of diffusers\)"),
        (
            ("refs/main", "blobs/x", "snapshots/abc/config.json"),
            r"got a repository of the hub.*: .*snapshots/abc$",
        ),
        (("params.json", "consolidated.00.pth"), r"got weights in their author's layout\)"),
        (("step-100/config.json", "notes.txt"), r"missing\); give one of the model folders in it: .*step-100$"),
        (("notes.txt",), r"missing\); give a transformers model folder$"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_what_is_no_model_folder_is_named(files: tuple[str, ...], says: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(SourceError, match=rf"config.json is required \({says}"):
        locate(tmp_path).read_config()


def test_gguf_files_of_the_hub_are_to_be_downloaded() -> None:
    assert explain_missing_config(["a.Q4_0.gguf"]).endswith("read from a disk); download one and give its path")


@pytest.mark.parametrize("broken", ["", "[]", "{}", '{"base_model_name_or_path": 3}', "[" * 100_000])
def test_a_broken_adapter_is_an_adapter_too(broken: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(broken)
    with pytest.raises(SourceError, match=r"got an adapter of PEFT\)"):
        locate(tmp_path).read_config()
