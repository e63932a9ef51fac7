import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from refold.checkpoint.reader import CheckpointReader
from refold.conversion.convert import ConvertOptions, convert
from refold.data.readers import DataSource, from_documents
from refold.healing.heal import HealResult, heal
from refold.healing.log import StepRecord
from refold.healing.run import HealOptions
from refold.recipe.heal import HealStage

RELAXED = {"fold": {"loops": 2, "init": "average"}, "relax": {"rank": 2, "init": "svd", "vectors": "own"}}
LETTERS = "\n" + string.ascii_letters + " .,?!"


@pytest.fixture(scope="session")
def source(make_source: Callable[..., Path]) -> Path:
    """A tiny bfloat16 source with a tied head and a tokenizer of single letters."""
    folder = make_source("llama", dtype="bfloat16", tie_word_embeddings=True)
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source with its layers tied in two loops, relaxed at rank 2."""
    folder = tmp_path_factory.mktemp("folded") / "model"
    convert(source, folder, RELAXED, options=ConvertOptions(allow_larger=True))
    return folder


@pytest.fixture(scope="session")
def documents() -> DataSource:
    """Many documents of a few dozen letters that follow a rule, so that there is something to learn."""
    return from_documents(
        [f"{letter} goes to {letter * (3 + index % 20)}." for index, letter in enumerate(LETTERS * 2)]
    )


@dataclass
class Healing:
    """Calls `heal` with small settings and records its reports.

    Attributes:
        model, destination, data: as for `heal`.
        records: of every step of every call, in order.
    """

    model: Path
    destination: Path
    data: DataSource = field(repr=False)
    records: list[StepRecord] = field(default_factory=list)
    hook: Callable[[StepRecord], object] | None = None

    @property
    def work(self) -> Path:
        return self.destination.parent / f".{self.destination.name}.heal"

    def stage(self, **settings: Any) -> HealStage:
        small = {"tokens": 12 * 64, "context": 16, "batch_tokens": 64, "micro_batch": 4, "learning_rate": 1e-2}
        return HealStage(**{**small, **settings})

    def __call__(self, settings: Mapping[str, Any] | None = None, **arguments: Any) -> HealResult:
        names = {field.name for field in fields(HealOptions)}
        chosen = {"device": "cpu", "quiet": True, "on_step": self._note}
        chosen |= {name: arguments.pop(name) for name in names & set(arguments)}
        calls = {"options": HealOptions(**chosen), **arguments}
        model, destination = calls.pop("model", self.model), calls.pop("destination", self.destination)
        stages = calls.pop("stages", None) or self.stage(**(settings or {}))
        return heal(model, destination, calls.pop("data", self.data), stages, **calls)

    def _note(self, record: StepRecord) -> None:
        self.records.append(record)
        if self.hook is not None:
            self.hook(record)


@pytest.fixture
def healing(folded: Path, documents: DataSource, tmp_path: Path) -> Healing:
    return Healing(folded, tmp_path / "healed", documents)


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Reads all tensors of a folder."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        with CheckpointReader(folder) as reader:
            return {name: reader.read(name).clone() for name in reader.names()}

    return read
