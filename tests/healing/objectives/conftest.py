from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from refold.conversion.convert import ConvertOptions, convert
from refold.healing.activations import observe
from refold.healing.objectives.objective import Loss, Objective, Step
from refold.modeling.configuration import RefoldConfig
from refold.modeling.load import load_model
from refold.modeling.model import RefoldForCausalLM


@pytest.fixture(scope="session")
def fold(make_source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Loads the fold of a tiny source in float64; the same source and recipe are converted once."""
    made: dict[str, Path] = {}

    def make(variant: str = "llama", recipe: Mapping[str, Any] | None = None, **options: Any) -> Any:
        fields = {name: options.pop(name) for name in list(options) if name.startswith(("num_", "hidden_"))}
        key = repr((variant, recipe, fields))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("folded") / variant
            convert(make_source(variant, **fields), made[key], recipe, options=ConvertOptions(allow_larger=True))
        return load_model(made[key], device="cpu", **{"dtype": torch.float64, **options})

    return make


@pytest.fixture(scope="session")
def compact() -> Callable[[Any], Any]:
    """Makes a model without the depths that run nothing, so that depths and source layers count differently."""

    def make(model: Any) -> Any:
        blueprint = model.config.read_blueprint()
        depths = tuple(depth for depth in blueprint.depths if depth.mixer is not None or depth.mlp is not None)
        blueprint = blueprint.model_copy(update={"depths": depths})
        made = RefoldForCausalLM(RefoldConfig(blueprint=blueprint.model_dump(mode="json")))
        made.load_state_dict(model.state_dict())
        return made.to(model.dtype).eval()

    return make


@pytest.fixture(scope="session")
def load_source(make_source: Callable[..., Path]) -> Callable[..., PreTrainedModel]:
    """Loads a tiny source with transformers alone, in float64."""

    def make(variant: str = "llama", attn: str = "eager", dtype: Any = torch.float64, **fields: Any) -> PreTrainedModel:
        folder = make_source(variant, **fields)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn).eval()

    return make


@dataclass
class Documents:
    """Rows of packed documents."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor

    @property
    def num_tokens(self) -> int:
        return int((self.labels != -100).sum())

    @property
    def scored(self) -> Tensor:
        """Which positions are, `[B, T]`."""
        return self.labels != -100

    @property
    def mask(self) -> Tensor:
        """`[B, 1, T, T]`, which earlier tokens of its document each token sees, written out token by token."""
        batch, tokens = self.input_ids.shape
        mask = torch.zeros(batch, 1, tokens, tokens, dtype=torch.bool)
        for row in range(batch):
            for query in range(tokens):
                begin = query - int(self.position_ids[row, query])
                mask[row, 0, query, begin : query + 1] = True
        return mask

    def each(self) -> "list[Documents]":
        """Every document alone, filling left out."""
        parts = (self.input_ids, self.position_ids, self.labels)
        places = [(0, slice(0, 10)), (0, slice(10, 16)), (1, slice(0, 5)), (1, slice(5, 12))]
        return [Documents(*(part[row : row + 1, columns] for part in parts)) for row, columns in places]

    def rows(self, rows: slice) -> "Documents":
        return Documents(self.input_ids[rows], self.position_ids[rows], self.labels[rows])

    def unpacked(self) -> "Documents":
        """The same tokens, taken for one document per row."""
        return replace(self, position_ids=torch.arange(self.input_ids.shape[1]).expand_as(self.input_ids))


@pytest.fixture(scope="session")
def documents() -> Documents:
    """Two rows of 16 tokens: documents of 10 and 6; of 5 and 7, and filling."""
    input_ids = torch.randint(2, 95, (2, 16), generator=torch.Generator().manual_seed(7))
    input_ids[1, 12:] = 0
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((10, 6), (5, 7, 4))])
    labels = torch.cat((input_ids[:, 1:], torch.full((2, 1), -100)), dim=1)
    for row, column in ((0, 9), (1, 4), (1, 11)):
        labels[row, column] = -100
    labels[1, 12:] = -100
    labels[0, 3] = -100
    return Documents(input_ids, position_ids, labels)


@pytest.fixture(scope="session")
def run_objective() -> Callable[..., Loss]:
    """Computes an objective's loss as a training step does."""

    def run(
        objective: Objective, student: Any, teacher: Any, documents: Documents, num_tokens: int | None = None
    ) -> Loss:
        objective.check(student, teacher)
        inputs = documents.input_ids, documents.position_ids
        with torch.no_grad():
            theirs = observe(teacher, *inputs, objective.teacher_wants)
        ours = observe(student, *inputs, objective.student_wants) if objective.student_wants else None
        count = documents.num_tokens if num_tokens is None else num_tokens
        return objective.loss(Step(student, *inputs, documents.labels, count, ours, theirs))

    return run


@pytest.fixture(scope="session")
def require_documents_apart(documents: Documents, run_objective: Callable[..., Loss]) -> Callable[..., None]:
    """Checks that the loss of packed documents equals that of separate ones, and differs from that of one document."""

    def require(objective: Objective, student: Any, teacher: Any) -> None:
        count = documents.num_tokens
        found = run_objective(objective, student, teacher, documents).total
        alone = [run_objective(objective, student, teacher, each, count).total for each in documents.each()]
        torch.testing.assert_close(found, torch.stack(alone).sum())
        leaking = run_objective(objective, student, teacher, documents.unpacked()).total
        assert (leaking - found).abs() > 1e-3 * found

    return require


@dataclass
class Plain:
    """A source's layers, called one by one as transformers has them."""

    model: Any
    documents: Documents

    @property
    def layers(self) -> list[Any]:
        return list(self.model.base_model.layers)

    @property
    def mask(self) -> Tensor:
        """Added to scores, window and documents kept."""
        seen = self.documents.mask
        window = getattr(self.model.config, "sliding_window", None)
        if window is not None:
            tokens = torch.arange(seen.shape[-1])
            seen = seen & (tokens[None, :] > tokens[:, None] - window)
        return torch.zeros(seen.shape, dtype=self.model.dtype).masked_fill_(~seen, torch.finfo(self.model.dtype).min)

    def streams(self, run: Sequence[int] | None = None) -> list[Tensor]:
        """The stream before each layer that is run, and after the last; None: all layers, in order."""
        streams = [self.model.get_input_embeddings()(self.documents.input_ids)]
        for layer in range(len(self.layers)) if run is None else run:
            streams.append(self.layer(layer, streams[-1]))
        return streams

    def layer(self, layer: int, stream: Tensor) -> Tensor:
        output = self.layers[layer](stream, attention_mask=self.mask, position_embeddings=self._rotation(stream))
        return output[0] if isinstance(output, tuple) else output

    def mixer(self, layer: int, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the update of the residual stream by attention, and the attention weights."""
        block = self.layers[layer]
        attention = block.attention if hasattr(block, "attention") else block.self_attn
        given = {"attention_mask": self.mask, "position_embeddings": self._rotation(stream)}
        return attention(block.input_layernorm(stream), **given)[:2]

    def _rotation(self, stream: Tensor) -> Any:
        return self.model.base_model.rotary_emb(stream, position_ids=self.documents.position_ids)


@pytest.fixture(scope="session")
def plain() -> Callable[[Any, Documents], Plain]:
    return Plain
