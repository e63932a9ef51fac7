"""SGLang's plugin against a stand-in of SGLang, whose wheels need a CUDA device."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from refold.conversion.convert import ConvertOptions, convert
from refold.errors import RefoldError
from refold.modeling.load import load_model

FOLD = {"loops": 2, "init": "average"}


class Backend(nn.Module):
    """A stand-in of SGLang's class: the stack on an attention function that returns `[tokens, heads x size]`."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = ""):
        super().__init__()
        self.model = AutoModel.from_config(config, attn_implementation="stand-in")

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.model(input_ids[None], position_ids=positions[None], use_cache=False, return_dict=False)[0][0]


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    names = ("sglang", "sglang.srt", "sglang.srt.models", "sglang.srt.models.transformers")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].TransformersForCausalLM = Backend  # pyright: ignore[reportAttributeAccessIssue]
    yield importlib.import_module("refold.plugins.sglang.model").EntryClass
    sys.modules.pop("refold.plugins.sglang.model", None)


@pytest.fixture
def make(make_source: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    def build(variant: str, recipe: dict[str, Any]) -> Any:
        convert(make_source(variant), tmp_path / "folded", recipe, options=ConvertOptions(allow_larger=True))
        return load_model(tmp_path / "folded", device="cpu")

    return build


@torch.no_grad()
def test_the_stack_runs_requests_side_by_side(
    entry: Any, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama", {"fold": FOLD, "relax": {"rank": 3}})
    lengths, seen = (7, 5), []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any) -> Any:
        seen.append(mask)
        plain, pieces = ALL_ATTENTION_FUNCTIONS["sdpa"], []
        for part in torch.arange(sum(lengths)).split(lengths):
            states = (each[:, :, part] for each in (query, key, value))
            pieces.append(plain(module, *states, None, **arguments)[0].flatten(2))
        return torch.cat(pieces, dim=1).flatten(0, 1), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "stand-in", attend)
    tokens = torch.randint(2, 95, (sum(lengths),), generator=torch.Generator().manual_seed(3))
    expected = torch.cat([model.model(part[None]).last_hidden_state[0] for part in tokens.split(lengths)])
    served = entry(model.config).eval()
    served.model.load_state_dict(model.model.state_dict())
    positions = torch.cat([torch.arange(length) for length in lengths])
    torch.testing.assert_close(served(tokens, positions), expected, rtol=1e-5, atol=1e-5)
    assert seen == [None] * 4


def test_the_class_has_the_name_of_the_architecture(entry: Any) -> None:
    assert entry.__name__ == "RefoldForCausalLM"


@pytest.mark.parametrize(
    ("variant", "recipe", "message"),
    [
        ("gemma2", {"fold": FOLD}, r"sglang: attention without a soft-cap is required \(got 2.0\)"),
        ("llama", {"mixers": [{"depths": [3], "type": "retention"}]}, r"sglang: .*\(got depth 3: retention\)"),
    ],
)
def test_other_stacks_are_refused(
    entry: Any, make: Callable[..., Any], variant: str, recipe: dict[str, Any], message: str
) -> None:
    config = make(variant, recipe).config
    with pytest.raises(RefoldError, match=message):
        entry(config)
