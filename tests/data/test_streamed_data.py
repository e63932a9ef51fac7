import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from refold.data.encoder import TextEncoder
from refold.data.field import Field
from refold.data.packing import IGNORED
from refold.data.streams import DatasetStream, DocumentStream, IterableStream
from refold.data.training_data import StreamedData
from refold.errors import DataError

CONTEXT, WINDOW = 16, 64
TEXTS = [f"The cat number {index} said hello {'dog ' * (index % 9)}" for index in range(150)]
FIELD = Field("text")


class Texts:
    """A re-iterable that counts its items as they are taken."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.taken = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.taken += 1
            yield text


def _iterable(_: Path) -> DocumentStream:
    return IterableStream(Texts(TEXTS), FIELD)


def _rows() -> Iterator[dict[str, str]]:
    yield from ({"text": text} for text in TEXTS)


def _generated(_: Path) -> DocumentStream:
    return DatasetStream(datasets.IterableDataset.from_generator(_rows), FIELD, "generated")


def _json(folder: Path) -> DocumentStream:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    loaded: Any = datasets.load_dataset(
        "json", data_files=str(path), split="train", streaming=True, cache_dir=str(folder / "hub")
    )
    return DatasetStream(loaded, FIELD, "texts.jsonl")


STREAMS = pytest.mark.parametrize("make", [_iterable, _generated, _json])


def _open(stream: DocumentStream, tokenizer: PreTrainedTokenizerFast, cache: Path, **options: Any) -> StreamedData:
    fields = {"context": CONTEXT, "seed": 3, "window_tokens": WINDOW, "workers": 1, **options}
    return StreamedData(stream, TextEncoder(tokenizer), cache_folder=cache, **fields)


def _read(data: StreamedData, positions: Any) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(data.sequence(position)) for position in positions]


def _same(one: list[tuple[torch.Tensor, ...]], other: list[tuple[torch.Tensor, ...]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for rows in zip(one, other, strict=True) for a, b in zip(*rows, strict=True)
    )


@pytest.fixture
def epoch(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    encoder = TextEncoder(tokenizer)
    return np.concatenate([document.ids for document in encoder.encode(TEXTS, None)])


@STREAMS
def test_windows_hold_the_stream_in_order_over_epochs(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, epoch: np.ndarray, make: Callable[[Path], DocumentStream]
):
    data = _open(make(tmp_path), tokenizer, tmp_path)
    num_windows = int(2.5 * len(epoch)) // WINDOW
    expected = np.concatenate([epoch, epoch, epoch])[: num_windows * WINDOW].reshape(num_windows, 4, CONTEXT)
    orders = set()
    for window in range(num_windows):
        rows = [data.sequence(4 * window + slot).input_ids.numpy() for slot in range(4)]
        # Every sequence of the window once, in an order of its own.
        found = [next(index for index in range(4) if np.array_equal(row, expected[window][index])) for row in rows]
        assert sorted(found) == [0, 1, 2, 3]
        orders.add(tuple(found))
        assert len(list(tmp_path.glob("stream-*/window-*"))) <= 2
    assert len(orders) > 5
    data.close()


def test_labels_never_cross_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    data = _open(_iterable(tmp_path), tokenizer, tmp_path)
    for ids, positions, labels in _read(data, range(60)):
        starts = ids == tokenizer.bos_token_id
        assert (positions[starts] == 0).all()
        assert (labels[:-1][positions[1:] == 0] == IGNORED).all()
        inside = positions[1:] != 0
        assert torch.equal(labels[:-1][inside], ids[1:][inside])
    data.close()


@STREAMS
@pytest.mark.parametrize("stop", [1, 15, 70, 171])
def test_a_resumed_run_reads_what_a_straight_one_does(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, make: Callable[[Path], DocumentStream], stop: int
):
    straight = _open(make(tmp_path), tokenizer, tmp_path / "straight")
    expected = _read(straight, range(stop, stop + 40))
    first = _open(make(tmp_path), tokenizer, tmp_path / "resumed")
    _read(first, range(stop))
    first.close()
    # As after a kill while the next window is written.
    for window in (tmp_path / "resumed").glob("stream-*/window-*"):
        (window.parent / f".{window.name}.unfinished").mkdir()
        if stop > 70:
            shutil.rmtree(window)
    second = _open(make(tmp_path), tokenizer, tmp_path / "resumed")
    assert second.identity == straight.identity
    assert _same(_read(second, range(stop, stop + 40)), expected)
    straight.close()
    second.close()


@STREAMS
def test_any_position_may_be_asked_for(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, make: Callable[[Path], DocumentStream]
):
    straight = _open(make(tmp_path), tokenizer, tmp_path / "straight")
    expected = _read(straight, range(120))
    jumping = _open(make(tmp_path), tokenizer, tmp_path / "jumping")
    for position in (90, 3, 91, 119, 0, 40):
        assert _same(_read(jumping, [position]), [expected[position]])
    straight.close()
    jumping.close()


def test_going_on_reads_the_stream_once(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    texts = Texts(TEXTS)
    data = _open(IterableStream(texts, FIELD), tokenizer, tmp_path)
    before = texts.taken
    _read(data, range(100))
    assert texts.taken - before <= 2 * len(TEXTS)
    data.close()


def test_seed_context_and_stream_are_in_the_identity(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    def identity(texts: list[str] = TEXTS, **options: Any) -> str:
        return _open(IterableStream(texts, FIELD), tokenizer, tmp_path, **options).identity

    assert identity() == identity()
    others = [identity(seed=4), identity(context=8), identity(window_tokens=128), identity(TEXTS[1:])]
    assert len({identity(), *others}) == 5


def test_two_processes_share_a_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    expected = _read(_open(_iterable(tmp_path), tokenizer, tmp_path / "alone"), range(80))
    ranks = [_open(_iterable(tmp_path), tokenizer, tmp_path / "shared") for _ in range(2)]
    for position in range(0, 80, 2):
        for rank, data in enumerate(ranks):
            assert _same(_read(data, [position + rank]), [expected[position + rank]])
    for data in ranks:
        data.close()


WORKER = """
import json, os, sys
from pathlib import Path
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from refold.data.encoder import TextEncoder
from refold.data.blocks import Field
from refold.data.training_data import StreamedData
from refold.data.streams import IterableStream
os.fsync = lambda _: None
folder = Path(sys.argv[1])
backend = Tokenizer.from_str((folder / "tokenizer.json").read_text())
encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))
stream = IterableStream(json.loads((folder / "texts.json").read_text()), Field("text"))
data = StreamedData(stream, encoder, context=16, seed=3, cache_folder=folder, window_tokens=64, workers=1)
for position in range(100_000):
    data.sequence(position)
    print(position, flush=True)
"""


def test_after_a_kill_the_same_sequences_come(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, bytes_backend: str):
    (tmp_path / "tokenizer.json").write_text(bytes_backend)
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    with subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = next(position for position in map(int, process.stdout) if position >= 30)
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    assert list(tmp_path.glob("stream-*/place-*.json"))
    straight = _open(_iterable(tmp_path), tokenizer, tmp_path / "straight")
    after = _open(_iterable(tmp_path), tokenizer, tmp_path)
    assert after.identity == straight.identity
    positions = range(last - 5, last + 60)
    assert _same(_read(after, positions), _read(straight, positions))
    after.close()
    straight.close()


def test_another_stream_under_the_same_name_is_found_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    first = _open(IterableStream(TEXTS, FIELD), tokenizer, tmp_path)
    _read(first, range(40))
    first.close()
    # The first documents, which make the identity, are the same.
    for texts in ([*TEXTS[:10], *("other " + text for text in TEXTS[10:])], TEXTS[:12]):
        changed = _open(IterableStream(texts, FIELD), tokenizer, tmp_path)
        assert changed.identity == first.identity
        with pytest.raises(
            DataError, match=r"the stream that training began with is required \(document \d+ of pass 1"
        ):
            _read(changed, range(40, 60))


def test_shuffled_streams_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    shuffled = datasets.IterableDataset.from_generator(_rows).shuffle(seed=1, buffer_size=20)
    stream = DatasetStream(shuffled, FIELD, "shuffled")
    with pytest.raises(DataError, match="shuffled: a stream that can go on where it stopped is required"):
        _open(stream, tokenizer, tmp_path)


def test_what_can_be_iterated_only_once_is_refused():
    with pytest.raises(DataError, match=r"data that can be iterated again is required \(got a generator"):
        IterableStream(_rows(), FIELD)


def test_empty_streams_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    for texts in ([], ["", ""]):
        with pytest.raises(DataError, match=r"one document that is not empty is required \(got none in documents"):
            _open(IterableStream(texts, FIELD), tokenizer, tmp_path)


def test_rows_without_the_field_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"rows: item 0: field 'body' is required \(got \['text'\]\)"):
        IterableStream([{"text": "a"}], Field("body"), "rows")
    with pytest.raises(DataError, match=r"item 1: field 'text' must be a string \(got int\)"):
        IterableStream(["a", 3], FIELD)


def test_a_stream_that_breaks_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    def broken() -> Iterator[dict[str, str]]:
        yield from ({"text": text} for text in TEXTS[:20])
        raise OSError("connection lost")

    stream = DatasetStream(datasets.IterableDataset.from_generator(broken), FIELD, "broken")
    with pytest.raises(DataError, match=r"broken: a stream that can be read is required \(connection lost\)"):
        _read(_open(stream, tokenizer, tmp_path), range(500))


def test_tokens_above_the_vocabulary_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(DataError, match=r"documents in memory: tokens below the model's 200 are required"):
        _open(_iterable(tmp_path), tokenizer, tmp_path, vocab_size=200)


def test_a_torn_record_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    data = _open(_iterable(tmp_path), tokenizer, tmp_path)
    _read(data, range(9))
    data.close()
    for path in tmp_path.glob("stream-*/place-*.json"):
        path.write_text('{"epoch": 0')
    with pytest.raises(DataError, match=r"place-000003\.json: a whole record is required .*; delete .* to begin anew"):
        _read(_open(_iterable(tmp_path), tokenizer, tmp_path), [12])
