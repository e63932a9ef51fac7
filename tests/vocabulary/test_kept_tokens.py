"""Ids map there and back, and the file gives the same ids again."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refold.errors import FolderError
from refold.vocabulary.kept_tokens import KeptTokens, read_kept_tokens


@given(ids=st.sets(st.integers(0, 199), min_size=1, max_size=120))
def test_ids_map_there_and_back(ids: set[int]):
    kept = KeptTokens(np.array(sorted(ids)), 200)
    new = torch.arange(kept.size)
    assert kept.from_source(kept.to_source(new)).tolist() == new.tolist()
    assert kept.to_source(new).tolist() == sorted(ids)
    mapped = kept.from_source(torch.arange(200)).tolist()
    assert [each for each in range(200) if mapped[each] < 0] == [each for each in range(200) if each not in ids]
    assert kept.numbers == {each: mapped[each] for each in sorted(ids)}


def test_the_file_gives_the_same_ids(tmp_path):
    assert read_kept_tokens(tmp_path) is None
    kept = KeptTokens(np.array([0, 3, 7]), 9)
    kept.write(tmp_path)
    found = read_kept_tokens(tmp_path)
    assert found is not None
    assert (found.ids.tolist(), found.source_size) == ([0, 3, 7], 9)


def test_another_tokenizer_is_no_cut():
    kept = KeptTokens(np.array([0, 3]), 9)
    assert kept.is_cut_of({"a": 0, "b": 1}, {"a": 0, "b": 3, "c": 4})
    assert not kept.is_cut_of({"a": 0, "b": 1}, {"a": 0, "b": 4, "c": 3})
    assert not kept.is_cut_of({"a": 0, "b": 2}, {"a": 0, "b": 3})


@pytest.mark.parametrize(
    "content",
    [
        {"format": 2, "source_size": 9, "ids": [1]},
        {"format": 1, "source_size": 9, "ids": []},
        {"format": 1, "source_size": 9, "ids": [1, 9]},
        {"format": 1, "source_size": 9, "ids": [-1, 2]},
        {"format": 1, "source_size": 9, "ids": [2, 2]},
        {"format": 1, "source_size": 9, "ids": [1.5]},
        {"format": 1, "source_size": "9", "ids": [1]},
        {"format": 1, "ids": 4},
    ],
)
def test_a_damaged_file_is_refused(content, tmp_path):
    (tmp_path / "kept_tokens.json").write_text(json.dumps(content))
    with pytest.raises(FolderError, match=r"kept_tokens.json: a list of kept tokens of format 1 is required"):
        read_kept_tokens(tmp_path)
