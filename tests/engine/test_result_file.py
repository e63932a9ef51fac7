import json
from pathlib import Path
from typing import Any

import pytest

from refold.checkpoint.lock import FolderLockedError
from refold.engine.result_file import ResultFile
from refold.engine.results import Continuation, Result, TokenLogprob
from refold.errors import DataError, FolderError

RUN = {"prompts_sha256": "abc", "sampling": {"stop": ("x",)}}


def result(index: int, **fields: Any) -> Result:
    choice = Continuation("naïve 🙂", (4, 5), (2, 2), "length", **fields)
    return Result(index, (1, 2, 3), (choice,), 0, {"finished": 0.25})


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fill(path: Path, *indices: int, run: Any = None, **options: Any) -> ResultFile:
    with ResultFile(path, RUN if run is None else run, 5, **options) as file:
        for index in indices:
            file.add(result(index), identity=f"id-{index}")
    return file


def test_results_are_lines_at_once_in_the_order_of_completion(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    with ResultFile(path, RUN, 5) as file:
        file.add(result(3), "c")
        assert [line["index"] for line in lines_of(path)] == [3]
        file.add(result(1, logprobs=(TokenLogprob(4, -0.5), TokenLogprob(5, -1.0)), ties=(1,)))
    first, second = lines_of(path)
    assert first == {
        "index": 3,
        "id": "c",
        "text": "naïve 🙂",
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "choices": [{"text": "naïve 🙂", "token_ids": [4, 5], "depths": [2, 2], "reason": "length"}],
        "seconds": {"finished": 0.25},
    }
    assert "id" not in second
    assert second["choices"][0]["logprobs"] == [[4, -0.5], [5, -1.0]]
    assert second["choices"][0]["ties"] == [1]


def test_a_later_run_goes_on(tmp_path: Path):
    path = tmp_path / "new" / "out.jsonl"
    fill(path, 3, 1)
    assert fill(path, 0).finished == {0, 1, 3}
    assert [line["index"] for line in lines_of(path)] == [3, 1, 0]


@pytest.mark.parametrize("tail", ['{"index": 2, "te', '{"index": 2', "\0\0\0", "{}\n", '{"index": 2}'])
def test_a_torn_last_line_is_removed(tmp_path: Path, tail: str):
    path = tmp_path / "out.jsonl"
    fill(path, 3, 1)
    with open(path, "a") as file:
        file.write(tail)
    assert fill(path, 0).finished == {0, 1, 3}
    assert [line["index"] for line in lines_of(path)] == [3, 1, 0]


def test_a_damaged_line_inside_is_named(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    fill(path, 3, 1)
    path.write_text(path.read_text(encoding="utf-8").replace('{"index": 3', '["index": 3'), encoding="utf-8")
    with pytest.raises(DataError, match=r"out\.jsonl:1: a result is required \(got b'\[\"index\""):
        fill(path, 0)


def test_an_index_outside_the_prompts_is_named(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    fill(path, 4)
    with (
        pytest.raises(DataError, match=r"out\.jsonl:1: index: must be below the number of prompts, 3 \(got 4\)"),
        ResultFile(path, RUN, 3),
    ):
        pass


def test_another_run_is_refused_and_may_start_anew(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    fill(path, 3, 1)
    before = path.read_bytes()
    with pytest.raises(FolderError, match=r"results of the same run are required \(prompts_sha256 was 'abc' and is 'd"):
        fill(path, 0, run={**RUN, "prompts_sha256": "def"})
    assert path.read_bytes() == before
    fill(path, 2, run={**RUN, "prompts_sha256": "def"}, overwrite=True)
    assert [line["index"] for line in lines_of(path)] == [2]
    with pytest.raises(FolderError, match="results of the same run are required"):
        fill(path, 0)


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_never_replaced(tmp_path: Path, overwrite: bool):
    path = tmp_path / "thesis.txt"
    path.write_text("mine")
    with pytest.raises(FolderError, match=r"thesis\.txt: a (new )?file.* is required"):
        fill(path, 0, overwrite=overwrite)
    assert path.read_text() == "mine"
    with pytest.raises(FolderError, match="a file name is required"):
        fill(tmp_path, 0, overwrite=overwrite)


def test_a_run_without_results_leaves_nothing_behind(tmp_path: Path):
    def fail() -> None:
        with ResultFile(tmp_path / "out.jsonl", RUN, 5):
            raise KeyError("no model")

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_write_one_file(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    with ResultFile(path, RUN, 5) as file:
        file.add(result(0))
        with pytest.raises(FolderLockedError, match="one writer at a time is required"):
            fill(path, 1)
