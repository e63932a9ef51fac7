import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from refold.data.field import Field
from refold.data.mixture import Mixture
from refold.data.packing import IGNORED, PackedSequences
from refold.data.readers import from_documents, open_data
from refold.data.streams import IterableStream
from refold.data.tokens import tokenise
from refold.data.training_data import open_training_data
from refold.errors import DataError

TEXTS = [f"The cat number {index} said hello {'dog ' * (index % 9)}" for index in range(60)]
OTHERS = [f"one two three {index} user" for index in range(25)]
TALKS = [
    [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": f"{number} hello"}]
    for number in range(30)
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_FIELD = Field("text")
_IN_ORDER: dict[str, list[list[int]]] = {}


def _jsonl(path: Path, documents: list[Any], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: document}) + "\n" for document in documents))
    return path


@pytest.fixture
def open_tiny(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    def opened(data: Any, **options: Any) -> Any:
        fields: dict[str, Any] = {"context": 16, "seed": 3, "budget": None, "cache_folder": tmp_path / "cache"}
        fields |= {"workers": 1, "window_tokens": 64, **options}
        return open_training_data(data, fields.pop("tokenizer", tokenizer), **fields)

    return opened


def _tokens(data: Any, positions: Any) -> list[list[int]]:
    return [data.sequence(position).input_ids.tolist() for position in positions]


def test_every_document_is_in_every_epoch_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, open_tiny: Callable[..., Any]
):
    data = open_tiny(_jsonl(tmp_path / "a.jsonl", TEXTS))
    whole = tokenise(from_documents(TEXTS), tokenizer, budget=None, seed=None)
    assert data.tokens_per_epoch == whole.num_tokens
    length = -(-whole.num_tokens // 16)
    padded = np.zeros(length * 16, dtype=np.int64)
    padded[: whole.num_tokens] = whole.tokens
    expected = sorted(padded.reshape(length, 16).tolist())
    orders = [_tokens(data, range(epoch * length, (epoch + 1) * length)) for epoch in range(3)]
    assert all(sorted(order) == expected for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_a_budget_takes_the_documents_that_tokenise_takes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, open_tiny: Callable[..., Any]
):
    source = open_data(_jsonl(tmp_path / "a.jsonl", TEXTS))
    data = open_tiny(source, budget=400)
    tokenised = tokenise(source, tokenizer, budget=400, seed=3)
    packed = PackedSequences(tokenised.tokens, tokenised.offsets, 16, 3)
    for one, other in zip(data.batch(7, 50), packed.batch(7, 50), strict=True):
        assert one.equal(other)


@settings(max_examples=10, deadline=None)
@given(positions=st.lists(st.integers(0, 2000), min_size=1, max_size=5), count=st.integers(1, 5))
def test_seeking_gives_what_reading_in_order_gives(
    tmp_path_factory: pytest.TempPathFactory, bytes_backend: str, positions: list[int], count: int
):
    folder = tmp_path_factory.getbasetemp() / "seeking"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bytes_backend), bos_token="<s>")
    mixture = Mixture([(from_documents(TEXTS), 2), (from_documents(OTHERS), 1.5), (IterableStream(TEXTS, _FIELD), 1)])
    options: dict[str, Any] = {"context": 16, "seed": 1, "budget": None, "cache_folder": folder, "window_tokens": 64}
    data = open_training_data(mixture, tokenizer, workers=1, **options)
    if "seeking" not in _IN_ORDER:
        _IN_ORDER["seeking"] = _tokens(data, range(300))
    for position in positions:
        first = position % 290
        assert data.batch(first, count).input_ids.tolist() == _IN_ORDER["seeking"][first : first + count]
    data.close()


def test_a_mixture_reads_every_part_at_its_share_and_its_own_pace(tmp_path: Path, open_tiny: Callable[..., Any]):
    paths = [_jsonl(tmp_path / "a.jsonl", TEXTS), _jsonl(tmp_path / "b.jsonl", OTHERS)]
    parts = [open_tiny(path) for path in paths]
    mixed = open_tiny([f"{paths[0]}=3", f"{paths[1]}=1"])
    found = _tokens(mixed, range(400))
    expected = [_tokens(part, range(301)) for part in parts]
    counts = [0, 0]
    for position, row in enumerate(found):
        part = next(part for part in (0, 1) if row == expected[part][counts[part]])
        counts[part] += 1
        assert abs(counts[0] - 0.75 * (position + 1)) < 1
    assert counts[1] * 16 > 3 * parts[1].tokens_per_epoch
    assert mixed.tokens_per_epoch is None
    assert mixed.identity != open_tiny(Mixture([(paths[0], 1), (paths[1], 1)])).identity


def test_a_mixtures_budget_is_shared_out(tmp_path: Path, open_tiny: Callable[..., Any]):
    paths = [_jsonl(tmp_path / "a.jsonl", TEXTS * 9), _jsonl(tmp_path / "b.jsonl", OTHERS * 9)]
    whole = open_tiny([f"{paths[0]}=3", f"{paths[1]}=1"], budget=None)
    part = open_tiny([f"{paths[0]}=3", f"{paths[1]}=1"], budget=640)
    sizes = [each.tokens_per_epoch for each in part.parts]
    assert sizes == [31 * 16, 11 * 16]
    assert all(size < each.tokens_per_epoch for size, each in zip(sizes, whole.parts, strict=True))


def test_only_what_the_assistant_says_has_labels(
    tmp_path: Path, make_tokenizer: Callable[..., Any], open_tiny: Callable[..., Any]
):
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    path = _jsonl(tmp_path / "chat.jsonl", TALKS, "messages")
    data = open_tiny(path, tokenizer=tokenizer, form="chat", context=1024)
    batch = data.sequence(0)
    labels = batch.labels[batch.labels != IGNORED].tolist()
    assert tokenizer.decode(labels) == "".join(f"{number} hello<|im_end|>\n" for number in range(30))
    inside = batch.labels != IGNORED
    assert batch.labels[:-1][inside[:-1]].equal(batch.input_ids[1:][inside[:-1]])
    assert data.identity != open_tiny(path, tokenizer=tokenizer, form="chat", context=512).identity


def test_plain_paths_are_one_source(tmp_path: Path, open_tiny: Callable[..., Any]):
    paths = [_jsonl(tmp_path / "a.jsonl", TEXTS), _jsonl(tmp_path / "b.jsonl", OTHERS)]
    sizes = [open_tiny(path).tokens_per_epoch for path in paths]
    for data in (paths, [str(path) for path in paths], tmp_path, [open_data(paths[0]), str(paths[1])]):
        assert open_tiny(data).tokens_per_epoch == sum(sizes)


def test_other_fields_and_data_sets_are_read(tmp_path: Path, open_tiny: Callable[..., Any]):
    expected = open_tiny(from_documents(TEXTS))
    body = _jsonl(tmp_path / "body.jsonl", TEXTS, "body")
    rows = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    for data in (f"{body}?field=body", rows):
        found = open_tiny(data)
        assert found.identity == expected.identity
        assert _tokens(found, range(9)) == _tokens(expected, range(9))
    assert open_tiny([f"{body}?field=body", rows]).tokens_per_epoch == 2 * expected.tokens_per_epoch


def test_a_lone_file_with_an_equals_sign_in_its_name_is_read(tmp_path: Path, open_tiny: Callable[..., Any]):
    for name in ("a=0.7", "b=1.txt"):
        (tmp_path / name).write_text(TEXTS[0])
        assert open_tiny(str(tmp_path / name)).tokens_per_epoch == open_tiny(tmp_path / name).tokens_per_epoch


def test_iterables_and_streamed_data_sets_are_streams(tmp_path: Path, open_tiny: Callable[..., Any]):
    class Texts:
        def __iter__(self):
            return iter(TEXTS)

    def rows():
        yield from ({"text": text} for text in TEXTS)

    expected: Any = None
    for data in (Texts(), datasets.IterableDataset.from_generator(rows), IterableStream(TEXTS, _FIELD)):
        opened = open_tiny(data)
        assert opened.tokens_per_epoch is None
        found = _tokens(opened, range(70))
        opened.close()
        assert expected in (None, found)
        expected = found


def test_conversations_can_be_streamed(make_tokenizer: Callable[..., Any], open_tiny: Callable[..., Any]):
    class Talks:
        def __iter__(self):
            return iter(TALKS)

    data = open_tiny(Talks(), tokenizer=make_tokenizer(chat_template=TEMPLATE), form="chat", context=64)
    labels = data.sequence(0).labels
    assert 0 < (labels != IGNORED).sum() < 64
    data.close()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"at least one file or data set is required \(got an empty list\)"),
        (Mixture([]), r"a mixture of at least one part is required \(got none\)"),
        (["a.jsonl=1", "a.jsonl"], r"weights for all parts or for none are required \(got some\)"),
        (["a.jsonl=1", "a.jsonl=0"], r"weights above 0 are required \(got 0\)"),
        ("a.jsonl=-1", r"weights above 0 are required \(got -1\)"),
        ("nowhere.jsonl", r"nowhere\.jsonl: an existing file or folder is required"),
        ([3], r"a path, a source, a data set or an iterable of texts is required \(got int\)"),
        ("empty.jsonl", r"at least one document is required \(got none in empty\.jsonl\)"),
        ("blank.jsonl", r"at least one document that is not empty is required \(got none in blank\.jsonl\)"),
        (["a.jsonl", "stream"], r"weights are required for a stream"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list([])}), r"one split is required .*\['train'\]"),
        (datasets.Dataset.from_list([{"body": "a"}]), r"column 'text' is required \(got \['body'\]\)"),
        (
            datasets.Dataset.from_list([{"text": "a"}]).select([]),
            r"at least one document is required \(got none in data",
        ),
        (
            datasets.Dataset.from_list([{"text": None}, {"text": "a"}]),
            r"row 0: column 'text' must be a string \(got null",
        ),
    ],
)
def test_what_cannot_be_data_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_tiny: Callable[..., Any], data: Any, message: str
):
    monkeypatch.chdir(tmp_path)
    _jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "empty.jsonl").write_text("")
    _jsonl(tmp_path / "blank.jsonl", ["", ""])
    if isinstance(data, list):
        data = [IterableStream(TEXTS, _FIELD) if each == "stream" else each for each in data]
    with pytest.raises(DataError, match=message):
        open_tiny(data)
    assert [path.name for path in (tmp_path / "cache").glob("*")] == []


def test_numbers_below_the_least_are_refused(open_tiny: Callable[..., Any]):
    with pytest.raises(DataError, match=r"sequence length of at least 2 tokens is required \(got 1\)"):
        open_tiny(from_documents(TEXTS), context=1)
    with pytest.raises(DataError, match=r"budget of at least 1 token is required \(got 0\)"):
        open_tiny(from_documents(TEXTS), budget=0)


def test_texts_are_no_conversations_and_the_other_way_round(
    tmp_path: Path, make_tokenizer: Callable[..., Any], open_tiny: Callable[..., Any]
):
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    talks = open_data(_jsonl(tmp_path / "chat.jsonl", TALKS, "messages"), form="chat")
    with pytest.raises(DataError, match=r"conversations are required for chat \(got a str\)"):
        open_tiny(from_documents(TEXTS), tokenizer=tokenizer, form="chat")
    with pytest.raises(DataError, match=r"texts are required \(got a Conversation\)"):
        open_tiny(talks)


def test_tokens_above_the_vocabulary_are_refused(open_tiny: Callable[..., Any]):
    with pytest.raises(DataError, match=r"documents in memory: tokens below the model's 100 are required \(got \d+\)"):
        open_tiny(from_documents(TEXTS), vocab_size=100)


def test_tokens_are_made_once(monkeypatch: pytest.MonkeyPatch, open_tiny: Callable[..., Any]):
    first = open_tiny(from_documents(TEXTS))
    monkeypatch.setattr("refold.data.training_data.Encoding", lambda *_, **__: pytest.fail("tokenised twice"))
    for options in ({}, {"seed": 4}, {"context": 32}):
        again = open_tiny(from_documents(TEXTS), **options)
        assert again.tokens_per_epoch == first.tokens_per_epoch
        assert (again.identity == first.identity) == (not options)


def test_a_torn_cache_is_refused(tmp_path: Path, open_tiny: Callable[..., Any]):
    open_tiny(from_documents(TEXTS))
    for path in (tmp_path / "cache").glob("tokens-*/tokens-00000.bin"):
        path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"a whole token cache is required \(tokens-00000\.bin has .*; delete it"):
        open_tiny(from_documents(TEXTS))


WORKER = """
import json, sys, time
from pathlib import Path
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from refold.data.readers import open_data
from refold.data.training_data import open_training_data
folder, pause = Path(sys.argv[1]), float(sys.argv[2])
backend = Tokenizer.from_str((folder / "tokenizer.json").read_text())
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
def told(tokens):
    print(tokens, flush=True)
    time.sleep(pause)
print("ready", flush=True)
sys.stdin.readline()
data = open_training_data(folder / "a.jsonl", tokenizer, context=16, seed=3, budget=None, workers=1,
                          cache_folder=folder / "cache", on_progress=told)
print("identity", data.identity, flush=True)
"""


@pytest.fixture
def start(tmp_path: Path, bytes_backend: str):
    (tmp_path / "tokenizer.json").write_text(bytes_backend)
    _jsonl(tmp_path / "a.jsonl", TEXTS * 20)
    processes: list[subprocess.Popen] = []

    def started(pause: float) -> subprocess.Popen:
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(tmp_path), str(pause)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def _line(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_one_of_two_processes_tokenises_and_a_killed_one_leaves_nothing_that_is_used(
    tmp_path: Path, start: Callable[[float], subprocess.Popen], open_tiny: Callable[..., Any]
):
    killed, other = start(60.0), start(1.0)
    for process in (killed, other):
        assert _line(process) == "ready"
    assert killed.stdin is not None
    print(file=killed.stdin, flush=True)
    assert int(_line(killed)) > 0
    assert [path.name[:8] for path in (tmp_path / "cache").glob(".tokens-*.unfinished")] == [".tokens-"]
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not list((tmp_path / "cache").glob("tokens-*"))

    assert other.stdin is not None
    print(file=other.stdin, flush=True)
    assert int(_line(other)) > 0
    # The other is at it: this one waits, and makes nothing.
    mine: list[int] = []
    found = open_tiny(tmp_path / "a.jsonl", on_progress=mine.append)
    assert mine == []
    assert f"identity {found.identity}" in other.communicate()[0].split("\n")
    expected = open_tiny(tmp_path / "a.jsonl", cache_folder=tmp_path / "alone", on_progress=mine.append)
    assert mine
    assert found.identity == expected.identity
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 1
    assert not list((tmp_path / "cache").glob(".*"))
