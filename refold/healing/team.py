"""The processes of one run: a single process, or several processes of torchrun with common decisions."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from refold.errors import HealError, RefoldError
from refold.modeling.depth import Depth
from refold.nn.mixers.mixer import Mixer
from refold.nn.part import StoredPart

BUCKET_ELEMENTS = 1 << 24
"""Number of gradient elements that are summed over the processes at once."""
Result = TypeVar("Result")


class Team:
    """Connects processes that train together, each with all weights: sums gradients, and shares decisions.

    With a single process every collective operation returns at once.

    Args:
        device: device of a single process; with several processes the launcher chooses the device.

    Raises:
        HealError: the configuration of accelerate would change the training (mixed precision).
    """

    def __init__(self, device: torch.device):
        try:
            self.accelerator = Accelerator(device_placement=False, mixed_precision="no", cpu=device.type == "cpu")
        except ValueError as error:
            reason = str(error).partition("\n")[0]
            raise HealError(f"heal: an accelerate set-up without mixed precision is required ({reason})") from None
        self.size = self.accelerator.num_processes
        self.rank = self.accelerator.process_index
        self.device = device if self.size == 1 else self.accelerator.device

    @property
    def is_first(self) -> bool:
        """Returns whether this is the first process, which writes the files."""
        return self.rank == 0

    def wrap(self, training: nn.Module) -> nn.Module:
        """Prepares a module for the processes; a plain team returns it unchanged."""
        return training

    def share(self, count: int) -> range:
        """Returns the rows of this process among `count` rows; the shares differ by at most one row."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def largest_share(self, count: int) -> int:
        """Returns the number of rows of the largest share."""
        return -(-count // self.size)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums the gradients of all processes; a missing gradient counts as zero."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(each.numel() for each in bucket) >= BUCKET_ELEMENTS:
                self._sum_bucket(bucket)
                bucket = []
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, bucket: Sequence[Tensor]) -> None:
        flat = torch.cat([each.flatten() for each in bucket])
        with _peers_alive():
            dist.all_reduce(flat)
        for each, part in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
            each.copy_(part.view_as(each))

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        """Clips the norm of the gradient to `limit` and returns the norm before, the same on every process."""
        norm: Any = nn.utils.clip_grad_norm_(parameters, limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums numbers over all processes."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device="cpu" if self.device.type == "cpu" else self.device)
        with _peers_alive():
            dist.all_reduce(tensor)
        return tensor.tolist()

    def sum_named(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums named numbers over all processes; every process must have the same names."""
        return dict(zip(values, self.sum(list(values.values())), strict=True))

    def first(self, action: Callable[[], Result]) -> Result | None:
        """Runs an action on the first process only; the other processes wait, and fail if it fails.

        Returns:
            The result of the action; None on the other processes.

        Raises:
            RefoldError: the error of the action, on every process.
        """
        if self.size == 1:
            return action()
        result, message = None, [None]
        if self.is_first:
            try:
                result = action()
            except RefoldError as error:
                dist.broadcast_object_list([str(error)], src=0)
                raise
        with _peers_alive():
            dist.broadcast_object_list(message, src=0)
        if message[0] is not None:
            raise HealError(f"heal: the first process failed ({message[0]})")
        return result

    def wait(self) -> None:
        """Waits until every process has called this function."""
        if self.size > 1:
            with _peers_alive():
                dist.barrier()

    def whole(self, tensor: Tensor) -> Tensor:
        """Returns the complete tensor of a parameter or optimizer state, which may be sharded."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def place(self, tensor: Tensor, like: Tensor) -> Tensor:
        """Returns a complete tensor, sharded over the processes like the tensor `like`."""
        if isinstance(like, DTensor) and tensor.shape == like.shape:
            return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
        return tensor.to(like.device)

    def leave(self) -> None:
        """Frees the memory of the accelerator."""
        self.accelerator.free_memory()


class ShardedTeam(Team):
    """Connects processes that train together, each with a share of every weight (FSDP2).

    A stored part is gathered when the first depth runs it, and stays in memory until the backward pass ends, because
    the next loop runs it again.
    """

    def wrap(self, training: nn.Module) -> nn.Module:
        if self.size == 1:
            return training
        for module in training.modules():
            owns = next(module.parameters(), None) is not None
            if isinstance(module, (StoredPart, Depth)) and owns:
                fully_shard(module, reshard_after_forward=False)
            if isinstance(module, Mixer):
                register_fsdp_forward_method(module, "matrix")
        fully_shard(training, reshard_after_forward=False)
        for module in training.modules():
            if isinstance(module, FSDPModule):
                # Gradients are summed without division, because losses are divided by the tokens of the whole step.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return training

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Does nothing, because the backward pass of FSDP sums the gradients."""


def is_first_process() -> bool:
    """Returns whether this process prints for the user: a single process, or the first process of a launcher."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _peers_alive() -> Iterator[None]:
    """Replaces the error of a collective operation, raised if another process has ended, by a HealError of one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise HealError(
            f"heal: all processes of the run are required (one of them ended: {reason}); "
            f"give the same command again, it goes on from the last checkpoint"
        ) from error
