"""The dtype of matrix products while training, and float32 attention for autocast on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from refold.nn.processor import has_instructions

SMALLEST_HIDDEN_SIZE = 128
"""Below this size the conversion of activations to bfloat16 costs as much time as the faster products save."""
FLOAT32_SDPA = "refold_float32_sdpa"


def choose_precision(wish: str, device: torch.device, hidden_size: int) -> torch.dtype | None:
    """Returns the dtype of autocast, None for float32.

    `auto` chooses bfloat16 on a GPU that supports it, and on a CPU with instructions for it (AMX or AVX512-BF16) if the
    hidden size is at least 128: a whole step is a third faster with AMX, and takes half the time on an AMD EPYC with
    AVX512-BF16. In other cases it chooses float32.

    Args:
        wish: `float32`, `bfloat16` or `auto`.
        device: the student's device.
        hidden_size: the student's.
    """
    if wish == "auto":
        pays = device.type == "cuda" or hidden_size >= SMALLEST_HIDDEN_SIZE
        wish = "bfloat16" if pays and has_fast_bfloat16(device) else "float32"
    return torch.bfloat16 if wish == "bfloat16" else None


def has_fast_bfloat16(device: torch.device) -> bool:
    """Returns whether the device has bfloat16 products in hardware: some GPUs, and CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and any(has_instructions(name) for name in ("amx_tile", "avx512_bf16"))


def attend_in_float32(model: PreTrainedModel) -> None:
    """Makes a model's scaled-dot-product attention run in float32 under autocast.

    The backward pass of PyTorch's fused attention for CPUs takes twice as long in bfloat16 as in float32. Models with
    another attention implementation (soft-capped attention) do not change.
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
