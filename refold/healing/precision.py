"""What matrix products run in while training."""

import torch


def choose_precision(wish: str, device: torch.device) -> torch.dtype | None:
    """Returns the dtype of autocast, None for float32.

    Args:
        wish: `float32`, `bfloat16` or `auto`.
        device: where the student is.
    """
    if wish == "auto":
        wish = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.bfloat16 if wish == "bfloat16" else None
