import json
from pathlib import Path
from typing import Any

import pytest

from refold.engine.prompt_file import read_prompts
from refold.errors import DataError
from refold.generation.sampling import Sampling


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "prompts.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def test_lines_are_texts_ids_and_conversations_with_settings_of_their_own(tmp_path: Path):
    messages = [{"role": "user", "content": "Où ?"}]
    path = write(
        tmp_path,
        {"prompt": "Once upon a time", "id": "a"},
        "",
        {"prompt": [1, 5, 7], "temperature": 1, "seed": 3, "stop": "\n", "logit_bias": {"17": -2}},
        {"messages": messages, "id": 4, "max_new_tokens": None, "n": 2},
    )
    found = read_prompts(path, Sampling(max_new_tokens=9, top_k=5))
    assert [line.prompt for line in found.lines] == ["Once upon a time", [1, 5, 7], messages]
    assert [line.id for line in found.lines] == ["a", None, 4]
    assert [line.where for line in found.lines] == [f"{path}:1", f"{path}:3", f"{path}:4"]
    first, second, third = (line.sampling for line in found.lines)
    assert first == Sampling(max_new_tokens=9, top_k=5)
    assert second == Sampling(max_new_tokens=9, top_k=5, temperature=1.0, seed=3, stop=("\n",), logit_bias={17: -2.0})
    assert (third.max_new_tokens, third.n, third.top_k) == (None, 2, 5)


def test_the_hash_is_that_of_the_bytes(tmp_path: Path):
    hashes = [read_prompts(write(tmp_path, {"prompt": text}), Sampling()).sha256 for text in ("a", "b", "a")]
    assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":2: a JSON object is required \(Expecting property name"),
        ("[" * 100_000, r":2: a JSON object is required \("),
        ("[1]", r":2: a JSON object is required \(got \[1\]\); write \{\"prompt\""),
        ({"promt": "x"}, r":2: 'promt' is no field of a prompt; did you mean 'prompt'\?; the fields are prompt, mess"),
        ({"id": "b"}, r":2: prompt: either `prompt` or `messages` is required \(got neither\)"),
        ({"prompt": "x", "messages": []}, r":2: prompt: either `prompt` or `messages` is required \(got both\)"),
        ({"prompt": []}, r":2: prompt: a text or a list of token ids is required \(got \[\]\)"),
        ({"prompt": [1, "x"]}, r":2: prompt: a text or a list of token ids is required \(got \[1, 'x'\]\)"),
        ({"prompt": [-1]}, r":2: prompt: a text or a list of token ids is required \(got \[-1\]\)"),
        ({"prompt": [True]}, r":2: prompt: a text or a list of token ids is required \(got \[True\]\)"),
        ({"prompt": None}, r":2: prompt: a text or a list of token ids is required \(got None\)"),
        ({"messages": "hello"}, r":2: messages: a list of objects with `role` and `content` is required"),
        ({"messages": [{"content": "x"}]}, r":2: messages: a list of objects with `role` and `content` is required"),
        ({"prompt": "x", "temperature": "hot"}, r":2: temperature: a number is required \(got 'hot'\)"),
        ({"prompt": "x", "top_p": 2}, r":2: top_p: must be above 0 and at most 1 \(got 2.0\)"),
        ({"prompt": "x", "n": None}, r":2: n: a whole number is required \(got None\)"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, r":2: logit_bias: token ids of 0 or more are required \(got 'a'\)"),
        ({"prompt": "x", "id": [1]}, r":2: id: a string or a whole number is required \(got \[1\]\)"),
        ({"prompt": "x", "id": "a"}, r":2: id: each id must occur once \(got 'a', as in .*:1\); change one"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: Any, message: str):
    path = write(tmp_path, {"prompt": "good", "id": "a"}, line)
    with pytest.raises(DataError, match=message):
        read_prompts(path, Sampling())


def test_files_without_prompts_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.jsonl: a file of prompts is required \(No such file"):
        read_prompts(tmp_path / "none.jsonl", Sampling())
    with pytest.raises(DataError, match=r"prompts\.jsonl: at least one prompt is required \(got none\)"):
        read_prompts(write(tmp_path, "", "  "), Sampling())
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "déjà"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl:1: a JSON object is required \('utf-8' codec"):
        read_prompts(tmp_path / "latin.jsonl", Sampling())
