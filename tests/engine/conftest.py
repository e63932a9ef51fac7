"""Fixtures: tiny folded models, and greedy tokens as transformers' `generate` makes them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor

from refold.conversion.convert import ConvertOptions, convert
from refold.engine.worker_process import WorkerProcesses
from refold.modeling.load import load_model

FOLD = {"loops": 2, "init": "average"}
RELAX = {"rank": 3, "vectors": "own"}
MIXER = {"depths": "all", "except": [0]}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "source": ("llama", {}),
    "strict": ("llama", {"fold": FOLD}),
    "relaxed": ("llama", {"fold": FOLD, "relax": {"rank": 3, "vectors": "tied"}}),
    "own vectors": ("gpt_neox", {"fold": FOLD, "relax": RELAX}),
    "gains": ("gemma2", {"fold": FOLD, "relax": {**RELAX, "gain": "own"}}),
    "low rank": ("llama", {"factor": {"parameters": 0.7, "weight": "none"}}),
    "basis": ("llama", {"fold": FOLD, "factor": {"parameters": 0.6, "share": "basis", "weight": "none"}}),
    "prefix": ("llama", {"fold": FOLD, "relax": {"type": "prefix", "length": 3}}),
    "first keys": ("llama", {"fold": FOLD, "share_kv": {"from": "first_loop"}}),
    "dropped": ("qwen3", {"drop": {"attention": {"layers": [1, 3]}, "mlp": {"layers": [2]}}}),
    "narrow": ("llama-mha-bias", {"width": {"mlp": [48, 32, 16, 40], "heads": [1, 2, 4, 3], "weight": "none"}}),
    "window": ("mistral-window", {"fold": FOLD}),
    "hybrid": ("llama", {"mixers": [{"type": "gated_deltanet", **MIXER}]}),
    "window hybrid": ("mistral-window", {"fold": FOLD, "mixers": [{"type": "mamba2", "depths": [1, 3]}]}),
    "recurrent": ("llama", {"fold": FOLD, "mixers": [{"type": "retention", "depths": "all"}]}),
    "exits": ("llama", {"fold": FOLD, "relax": {"rank": 3}, "exits": {"gate": True}}),
    "exits first keys": ("llama", {"fold": FOLD, "share_kv": {"from": "first_loop"}, "exits": {}}),
    "exits recurrent": ("llama", {"fold": FOLD, "exits": {}, "mixers": [{"type": "retention", "depths": [1, 3]}]}),
    "three loops": ("llama", {"fold": {"loops": 3}, "exits": {}}),
}
"""Name to the variant of the source and the recipe."""


@pytest.fixture(scope="session")
def load(make_source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Loads one of `MODELS`, with all adapters and vectors of visible size; each is made once."""
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            variant, recipe = MODELS[name]
            folder = tmp_path_factory.mktemp("folded") / "model"
            layers = {"num_hidden_layers": 6} if name == "three loops" else {}
            convert(make_source(variant, **layers), folder, recipe, options=ConvertOptions(allow_larger=True))
            model = load_model(folder, device="cpu", dtype="float32")
            generator = torch.Generator().manual_seed(5)
            for tensor, weight in model.named_parameters():
                if any(kind in tensor for kind in (".lora.", ".vectors.", ".gain.", ".prefix", ".gate.")):
                    weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
            made[name] = model
        return made[name]

    return make


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerProcesses]:
    """Three attention workers that serve one engine after the other."""
    found = WorkerProcesses(3, threads=1, once=False)
    yield found
    found.close()


GENERATED: WeakKeyDictionary[Any, dict[str, list[int]]] = WeakKeyDictionary()
"""Greedy tokens by model and question: many tests ask the same of a model that none of them changes."""


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], count: int, **given: Any) -> list[int]:
    """Greedy tokens of transformers' `generate`, without an end token."""
    known, key = GENERATED.setdefault(model, {}), repr((list(prompt), count, given))
    if key not in known:
        ids: Tensor = torch.tensor([list(prompt)])
        found = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0, **given)
        known[key] = found[0, len(prompt) :].tolist()
    return known[key]


def make_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 95, (length,), generator=generator).tolist() for length in lengths]


def options(**given: Any) -> Mapping[str, Any]:
    """Settings of a small engine."""
    return {"page_size": 4, "max_rows": 4, "chunk": 16, "weights": "auto", "join_loops": True, **given}
