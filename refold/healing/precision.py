"""What matrix products run in while training, and the attention that goes with it on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

SMALLEST_HIDDEN_SIZE = 128
"""Below it, converting activations to bfloat16 costs about what the faster products save."""
FLOAT32_SDPA = "refold_float32_sdpa"


def choose_precision(wish: str, device: torch.device, hidden_size: int) -> torch.dtype | None:
    """Returns the dtype of autocast, None for float32.

    `auto` takes bfloat16 on a GPU that has it, and on a CPU with matrix tiles (AMX) from a hidden size of 128 on, where
    a whole step is a third faster; elsewhere float32.

    Args:
        wish: `float32`, `bfloat16` or `auto`.
        device: where the student is.
        hidden_size: the student's.
    """
    if wish == "auto":
        pays = device.type == "cuda" or hidden_size >= SMALLEST_HIDDEN_SIZE
        wish = "bfloat16" if pays and has_fast_bfloat16(device) else "float32"
    return torch.bfloat16 if wish == "bfloat16" else None


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products run faster in bfloat16 there: on a GPU that has it, on a CPU with matrix tiles (AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # The check is not public, and not in every version of torch.
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return device.type == "cpu" and has_tiles()


def attend_in_float32(model: PreTrainedModel) -> None:
    """Lets a model's scaled-dot-product attention run in float32 under autocast.

    PyTorch's fused attention for CPUs has a backward pass that takes twice as long in bfloat16 as in float32. Models
    that run other attention (soft-capped ones) stay as they are.
    """
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(FLOAT32_SDPA, _float32_sdpa)
        AttentionMaskInterface.register(FLOAT32_SDPA, sdpa_mask)
        model.set_attn_implementation(FLOAT32_SDPA)


def _float32_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast(query.device.type, enabled=False):
        states = (query.float(), key.float(), value.float())
        mixed, _ = sdpa_attention_forward(module, *states, attention_mask, **options)
    return mixed.to(query.dtype), None
