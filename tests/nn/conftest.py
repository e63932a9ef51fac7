"""Mixers outside a model, with weights that are large enough to show differences."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, LinearAttentionLayer

from refold.families.arch import ArchSpec, Layer, Norm, Rope
from refold.nn.mixers.batch import DepthInputs
from refold.nn.mixers.memory import CacheMemory
from refold.nn.mixers.mixer import Mixer
from refold.nn.mixers.registry import MIXERS
from refold.nn.mixers.store import NOTHING_KEPT
from refold.nn.rotary import Rotary
from refold.planning.mixers import choose_mixers
from refold.recipe.recipe import Recipe


@dataclass
class LoneMixer:
    """One mixer as a depth would run it.

    Attributes:
        arch: Of the source it might stand in.
        spec: Resolved.
        mixer: With random weights.
        view: Its place in a cache.
    """

    arch: ArchSpec
    spec: Any
    mixer: Mixer
    view: nn.Module

    def weight(self, name: str) -> Tensor:
        """Returns a weight in float64."""
        return self.mixer.get_parameter(name).detach().double()

    def fill(self, **values: Tensor) -> None:
        """Sets weights, all of them; `__` stands for the dot in names."""
        self.mixer.load_state_dict({name.replace("__", "."): value for name, value in values.items()})

    def context(
        self, tokens: int, cache: Cache | None = None, resets: Tensor | None = None, past: int = 0
    ) -> DepthInputs:
        rope = self.arch.layers[0].rope
        assert rope is not None
        positions = torch.arange(past, past + tokens)[None]
        rotation = Rotary(rope, 512)(positions, torch.float32)
        memory = NOTHING_KEPT if cache is None else CacheMemory(cache, 0)
        return DepthInputs(rotation=rotation, resets=resets, memory=memory)

    @torch.no_grad()
    def run(self, x: Tensor, resets: Tensor | None = None) -> Tensor:
        return self.mixer(x, self.view, self.context(x.shape[1], None, resets), {}, None)[0]

    @torch.no_grad()
    def run_with_cache(self, x: Tensor, prefill: int) -> Tensor:
        """Runs `prefill` tokens at once, and the others one by one."""
        cache = Cache(layers=[LinearAttentionLayer()])
        found, past = [], 0
        for piece in x.split([prefill] + [1] * (x.shape[1] - prefill), dim=1):
            found.append(self.mixer(piece, self.view, self.context(piece.shape[1], cache, None, past), {}, None)[0])
            past += piece.shape[1]
        return torch.cat(found, dim=1)

    @torch.no_grad()
    def matrix(self, x: Tensor, resets: Tensor | None = None) -> Tensor:
        return self.mixer.matrix(x, self.view, self.context(x.shape[1], None, resets), {}, None)


@pytest.fixture(scope="session")
def make_mixer() -> Callable[..., LoneMixer]:
    """Makes a mixer from an entry of a recipe's `mixers`; `arch` replaces fields of the architecture."""

    def make(kind: str, arch: dict[str, Any] | None = None, **entry: Any) -> LoneMixer:
        spec = make_arch(**(arch or {}))
        recipe = Recipe.model_validate({"mixers": [{"type": kind, "transfer": [], **entry}]})
        chosen = choose_mixers(recipe, spec)[0].mixer
        mixer = MIXERS[kind].create(spec, chosen, True)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, weight in mixer.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                is_scale = name.endswith(("_norm.weight", "heads.scale")) or name == "D"
                weight.copy_(noise * (0.7 if name in ("A_log", "dt_bias") else 0.3) + is_scale)
        config = PreTrainedConfig()
        config._attn_implementation = "sdpa"
        return LoneMixer(spec, chosen, mixer, MIXERS[kind].view(config, spec, 0, None))

    return make


@pytest.fixture
def hidden_states() -> Tensor:
    """Two rows of 130 tokens, two chunks and two more; hidden size 32."""
    return torch.randn(2, 130, 32, generator=torch.Generator().manual_seed(5))


def make_arch(**fields: Any) -> ArchSpec:
    head_dim = fields.get("head_dim", 8)
    plain: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "layers": (Layer(rope=Rope(rotary_dim=head_dim)),),
        "norm": Norm(eps=1e-5),
        "activation": "silu",
        "attention_scale": head_dim**-0.5,
    }
    return ArchSpec(**{**plain, **fields})
