"""Work of the mixers' benchmark: whole mixers and bare recurrences of one width, on one row of random numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from refold.families.arch import ArchSpec, Layer, Norm, Rope
from refold.mixers.attention import Attention
from refold.mixers.spec import MixerSpec
from refold.nn.mixers.batch import DepthInputs
from refold.nn.mixers.memory import CacheMemory
from refold.nn.mixers.mixer import Mixer
from refold.nn.mixers.registry import MIXERS
from refold.nn.mixers.store import NOTHING_KEPT
from refold.nn.rotary import Rotary
from refold.ops import channel_decay, delta_rule, scalar_decay, selective_scan
from refold.planning.mixers import choose_mixers
from refold.recipe.recipe import Recipe

HEADS, HEAD_SIZE, WIDTH = 8, 64, 512
SCAN_WIDTH, SCAN_STATE = 2 * WIDTH, 16
"""Of the bare selective scan; what Mamba has by default at this width."""
ROPE = Rope(rotary_dim=HEAD_SIZE)
ARCH = ArchSpec(
    family="llama",
    vocab_size=32,
    hidden_size=WIDTH,
    intermediate_size=2 * WIDTH,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
    head_dim=HEAD_SIZE,
    max_position_embeddings=2**16,
    layers=(Layer(rope=ROPE),),
    norm=Norm(),
    activation="silu",
    attention_scale=HEAD_SIZE**-0.5,
)

ATTENTION = "attention"
"""The rival, whole and bare: PyTorch's scaled_dot_product_attention, causal."""
WHOLE: Mapping[str, dict[str, Any]] = {
    ATTENTION: {},
    "retention": {"type": "retention"},
    "mamba2": {"type": "mamba2"},
    "gated_deltanet": {"type": "gated_deltanet"},
    "gla": {"type": "gla"},
    "linear_attention": {"type": "linear_attention"},
    "linear_attention, window 64": {"type": "linear_attention", "window": 64},
    "mamba": {"type": "mamba"},
}
"""Name to entry of a recipe's `mixers`; what is not said is as by default."""


@dataclass
class Work:
    """A differentiable computation.

    Attributes:
        call: Computes it.
        leaves: Inputs and weights that get gradients.
    """

    call: Callable[[], Tensor]
    leaves: list[Tensor]
    _d_out: Tensor | None = field(default=None, repr=False)

    def forward(self) -> None:
        with torch.no_grad():
            self.call()

    def train(self) -> None:
        out = self.call()
        if self._d_out is None:
            self._d_out = torch.randn_like(out)
        torch.autograd.grad(out, self.leaves, self._d_out)


class LoneMixer:
    """A mixer of refold as the only depth of a stack.

    Args:
        kind: Name in the registry of mixers.
        entry: Of the recipe; `{}` for attention.
    """

    def __init__(self, kind: str, entry: Mapping[str, Any]):
        chosen: MixerSpec = Attention()
        if kind != ATTENTION:
            recipe = Recipe.model_validate({"mixers": [{"transfer": [], **entry}]})
            chosen = choose_mixers(recipe, ARCH)[0].mixer
        config = PreTrainedConfig()
        config._attn_implementation = "sdpa"
        self.mixer: Mixer = MIXERS[kind].create(ARCH, chosen, True)
        self.view: nn.Module = MIXERS[kind].view(config, ARCH, 0, None)
        self.rotary = Rotary(ROPE, ARCH.max_position_embeddings)

    @classmethod
    def named(cls, name: str) -> "LoneMixer":
        """Makes one of `WHOLE`."""
        return cls(WHOLE[name].get("type", ATTENTION), WHOLE[name])

    def bind(self, x: Tensor, cache: Cache | None = None, past: int = 0) -> Callable[[], Tensor]:
        """Returns the call for a row whose first token is number `past`; cosines and sines are made here."""
        rotation = self.rotary(torch.arange(past, past + x.shape[1], device=x.device)[None], x.dtype)
        memory = NOTHING_KEPT if cache is None else CacheMemory(cache, 0)
        inputs = DepthInputs(rotation=rotation, memory=memory)
        return lambda: self.mixer(x, self.view, inputs, {}, None)[0]

    def work(self, tokens: int) -> Work:
        x = torch.randn(1, tokens, WIDTH, requires_grad=True)
        return Work(self.bind(x), [x, *self.mixer.parameters()])


@dataclass(frozen=True)
class Recurrence:
    """A bare recurrence.

    Attributes:
        run: In chunks.
        naive: Token by token; None for attention, which has no such form.
        make: Returns its inputs for so many tokens.
    """

    run: Callable[..., Any]
    naive: Callable[..., Any] | None
    make: Callable[[int], list[Tensor]]

    def work(self, tokens: int, is_naive: bool = False) -> Work:
        run = self.naive if is_naive else self.run
        assert run is not None
        leaves = [tensor.requires_grad_() for tensor in self.make(tokens)]
        return Work(lambda: run(*leaves)[0], leaves)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2),)


def _heads(tokens: int) -> list[Tensor]:
    """Queries with their scale, keys of about length one, values."""
    q, k, v = (torch.randn(1, tokens, HEADS, HEAD_SIZE) for _ in range(3))
    return [q * HEAD_SIZE**-0.5, nn.functional.normalize(k, dim=-1), v]


def _log_decays(*shape: int) -> Tensor:
    return nn.functional.logsigmoid(torch.randn(shape)) / 16


def _scan_inputs(tokens: int) -> list[Tensor]:
    x, b, c = (torch.randn(1, tokens, size) for size in (SCAN_WIDTH, SCAN_STATE, SCAN_STATE))
    steps = torch.rand(1, tokens, SCAN_WIDTH) * 0.1
    return [x, steps, -torch.rand(SCAN_WIDTH, SCAN_STATE) * SCAN_STATE, b, c]


def _undecayed(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda q, k, v: run(q, k, v, None)


BARE: Mapping[str, Recurrence] = {
    ATTENTION: Recurrence(_attend, None, _heads),
    "retention": Recurrence(
        scalar_decay.chunked, scalar_decay.naive, lambda tokens: [*_heads(tokens), _log_decays(HEADS)]
    ),
    "SSD": Recurrence(
        scalar_decay.chunked, scalar_decay.naive, lambda tokens: [*_heads(tokens), _log_decays(1, tokens, HEADS)]
    ),
    "gated delta rule": Recurrence(
        delta_rule.chunked,
        delta_rule.naive,
        lambda tokens: [*_heads(tokens), torch.rand(1, tokens, HEADS), _log_decays(1, tokens, HEADS)],
    ),
    "decay per channel": Recurrence(
        channel_decay.chunked,
        channel_decay.naive,
        lambda tokens: [*_heads(tokens), _log_decays(1, tokens, HEADS, HEAD_SIZE)],
    ),
    "no decay": Recurrence(_undecayed(scalar_decay.chunked), _undecayed(scalar_decay.naive), _heads),
    "selective scan": Recurrence(selective_scan.chunked, selective_scan.naive, _scan_inputs),
}
