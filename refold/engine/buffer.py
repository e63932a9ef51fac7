"""Memory for a large intermediate result that every step needs anew."""

import torch
from jaxtyping import Float32
from torch import Tensor


class Buffer:
    """Float32 memory that is kept between steps: giving it back and getting it again costs a page fault for 4 kB.

    Args:
        device: Its device.
    """

    def __init__(self, device: torch.device):
        self._memory = torch.empty(0, device=device)

    def take(self, rows: int, columns: int) -> Float32[Tensor, "rows columns"]:
        """Returns the memory as a matrix with any content; matrices taken before share it."""
        if self._memory.numel() < rows * columns:
            self._memory = self._memory.new_empty(rows * columns)
        return self._memory[: rows * columns].view(rows, columns)
