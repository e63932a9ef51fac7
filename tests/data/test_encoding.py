import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from refold.data.encoder import Encoding, TextEncoder, default_workers

TEXTS = [f"The cat number {index} said hello {'dog ' * (index % 9)}" for index in range(80)]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("batch_characters", [1, 100, 2**20])
def test_the_order_is_that_of_the_documents(tokenizer: PreTrainedTokenizerFast, workers: int, batch_characters: int):
    encoder = TextEncoder(tokenizer)
    seen: list[int] = []
    encoding = Encoding(
        TEXTS, encoder, budget=None, workers=workers, on_progress=seen.append, batch_characters=batch_characters
    )
    found = [document.ids.tolist() for document in encoding]
    # The library's own call is what tokens are compared with.
    assert found == [[0, *ids] for ids in tokenizer(TEXTS, add_special_tokens=False)["input_ids"]]
    assert encoding.is_whole_source
    assert seen == sorted(seen)
    assert seen[-1] == encoding.num_tokens == sum(map(len, found))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("budget", [1, 13, 500, 10**6])
def test_a_budget_cuts_the_same_stream(tokenizer: PreTrainedTokenizerFast, workers: int, budget: int):
    encoder = TextEncoder(tokenizer)
    whole = np.concatenate([document.ids for document in encoder.encode(TEXTS, None)])
    encoding = Encoding(TEXTS, encoder, budget=budget, workers=workers, batch_characters=200)
    assert np.array_equal(np.concatenate([document.ids for document in encoding]), whole[:budget])
    assert encoding.is_whole_source == (budget >= len(whole))


def test_documents_are_read_not_far_ahead_of_the_budget(tokenizer: PreTrainedTokenizerFast):
    texts = iter(TEXTS * 1000)
    assert len(list(Encoding(texts, TextEncoder(tokenizer), budget=100, workers=4))) < 20
    assert sum(1 for _ in texts) > 79_000


def test_an_error_of_reading_comes_through(tokenizer: PreTrainedTokenizerFast):
    def texts():
        yield from TEXTS
        raise KeyError

    with pytest.raises(KeyError):
        list(Encoding(texts(), TextEncoder(tokenizer), budget=None, workers=2))


def test_padding_and_truncation_of_the_caller_are_not_taken_over(tokenizer: PreTrainedTokenizerFast):
    tokenizer.pad_token = "</s>"
    tokenizer(TEXTS[:3], padding=True, truncation=True, max_length=7)
    lengths = {len(document.ids) for document in TextEncoder(tokenizer).encode(TEXTS[:9], None)}
    assert len(lengths) > 5
    assert max(lengths) > 8


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("TOKENIZERS_PARALLELISM", "false", 1), ("TOKENIZERS_PARALLELISM", "0", 1), ("RAYON_NUM_THREADS", "3", 3)],
)
def test_settings_of_the_tokenizer_library_are_respected(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: int
):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    assert default_workers() >= 1
    monkeypatch.setenv(name, value)
    assert default_workers() == expected
