"""Adapters of folds: other sets for the same stored blocks, and the names of linears for other adapter libraries."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from refold.blueprint.schema import Blueprint
from refold.blueprint.tensors import target_tensors
from refold.checkpoint.finite import require_finite
from refold.checkpoint.locate import Source
from refold.checkpoint.reader import CheckpointReader
from refold.errors import FolderError, RefoldError
from refold.modeling.depth import Depth
from refold.modeling.load import open_source
from refold.modeling.model import RefoldForCausalLM
from refold.modeling.packed_weights import PackedBytes, pack_adapters
from refold.nn.factored import BasisLinear, FactoredLinear
from refold.nn.stored_integers import SCALE
from refold.suggest import did_you_mean


@torch.no_grad()
def load_adapters(model: nn.Module, source: str | Path | Source) -> int:
    """Gives a loaded model the adapters of another folder that was healed from the same blocks.

    Args:
        model: A folded model with adapters.
        source: A folded model's folder or hub id, such as the `domain` protocol writes: only its adapters differ.

    Returns:
        The number of tensors that were replaced.

    Raises:
        RefoldError: The model is no folded one, or has no adapters.
        FolderError: The folder's adapters have other names or shapes, or sit on other blocks.
    """
    if not isinstance(model, RefoldForCausalLM):
        raise RefoldError(f"adapters: a folded model is required (got {type(model).__name__})")
    model.hold_integers()

    def holds(name: str, tensor: Tensor) -> bool:
        own = model.get_parameter(name)
        return torch.equal(own, tensor.to(own.device, own.dtype))

    adapters = read_adapters(model.config.read_blueprint(), source, holds)
    for name, tensor in adapters.items():
        own = model.get_parameter(name)
        own.copy_(tensor.to(own.device, own.dtype))
    model.settle_integers()
    return len(adapters)


def adapter_names(blueprint: Blueprint) -> list[str]:
    """Returns the names of all tensors that are adapters, sorted.

    Raises:
        RefoldError: There is none.
    """
    names = sorted(each.name for each in target_tensors(blueprint) if "adapters" in each.groups)
    if not names:
        raise RefoldError("adapters: a model that has some is required (it has none); convert with a `relax` section")
    return names


def read_adapters(
    blueprint: Blueprint, source: str | Path | Source, holds: Callable[[str, Tensor], bool]
) -> dict[str, Tensor]:
    """Reads the adapters of a folder as they are stored.

    Args:
        blueprint: Of the model they shall fit.
        source: Folder or hub id.
        holds: Says whether the model has this tensor under this name; it is asked for all that are no adapters.

    Raises:
        RefoldError: The blueprint has no adapters.
        FolderError: Those of the folder have other names or shapes, sit on other blocks, or are not finite.
    """
    adapters = adapter_names(blueprint)
    tensors = list(target_tensors(blueprint))
    _, folder = open_source(source)
    found: dict[str, Tensor] = {}
    with CheckpointReader(folder, blueprint) as reader:
        stored = {name: tuple(reader.info(name).shape) for name in reader.names()}
        wanted = {each.name: each.shape for each in tensors}
        different = sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name))
        if different:
            raise FolderError(
                f"{folder}: adapters of this model's blueprint are required ({len(different)} tensors have another "
                f"name or shape, such as {different[0]}); fold both with one recipe"
            )
        for name in sorted(stored.keys() - set(adapters)):
            if not holds(name, reader.read(name)):
                raise FolderError(
                    f"{folder}: adapters trained on this model's blocks are required ({name} differs); heal them from "
                    f"this model with `train: [adapters]`"
                )
        for name in adapters:
            found[name] = reader.read(name)
            require_finite(found[name], name, str(folder), FolderError, "heal the adapters again")
    return found


class AdapterSet(NamedTuple):
    """Other adapters of a model, beside its own.

    Attributes:
        name: By which requests choose them.
        number: Names them in memory; 0 would be the model's own.
        depths: The model's depths with these adapters. Blocks, vectors and coefficients are the model's.
        num_bytes: Of the adapters.
    """

    name: str
    number: int
    depths: tuple[Depth, ...]
    num_bytes: int


class AdapterBase:
    """A model that may get further adapters, and the weights it had before it was packed, to compare blocks with.

    Args:
        model: Not packed yet, unless it never will be.
        folder: Holds the model's weights as they are, and is read when the first adapters come; None: the model is
            read instead.
        is_packed_next: Whether the model will be packed, so that it can be read only now.
    """

    def __init__(self, model: RefoldForCausalLM, folder: Path | None, is_packed_next: bool):
        self.blueprint, self._folder, self._dtype = model.config.read_blueprint(), folder, model.dtype
        self._was_packed = model.is_packed
        self._digests: dict[str, bytes] = {}
        has_adapters = any("adapters" in each.groups for each in target_tensors(self.blueprint))
        if folder is None and is_packed_next and has_adapters:
            self._digests = self._digest_model(model)

    @torch.no_grad()
    def make(
        self, model: RefoldForCausalLM, packed: PackedBytes | None, source: str | Path | Source, name: str, number: int
    ) -> AdapterSet:
        """Reads adapters and prepares them as the model's own are.

        Args:
            model: The model, packed or not.
            packed: From `pack_model`; None: it is not packed.
            source: Folder or hub id of the fold that has them.
            name: Of the adapters.
            number: Of the adapters, at least 1.

        Raises:
            RefoldError: The model has no adapters, or was packed elsewhere.
            FolderError: As for `load_adapters`.
        """
        adapter_names(self.blueprint)
        if self._was_packed:
            raise RefoldError("adapters: a model that still has its blocks is required (it is packed); give its folder")
        digests = self._digests or self._digest_blocks(model)
        if packed is not None:
            self._digests = digests  # the blocks of a packed model do not change any more
        found = read_adapters(self.blueprint, source, lambda name, tensor: digests[name] == self._digest(name, tensor))
        held = {name: self._as_held(name, tensor).to(model.device, copy=True) for name, tensor in found.items()}
        depths = [
            depth.with_adapters(model.config, self.blueprint, _of_depth(held, depth.index), number)
            for depth in cast("list[Depth]", list(model.model.depths))
        ]
        num_bytes = sum(each.nbytes for each in held.values())
        if packed is not None:
            num_bytes = pack_adapters(model, depths, packed.formats)
        return AdapterSet(name, number, tuple(depths), num_bytes)

    def _digest_blocks(self, model: RefoldForCausalLM) -> dict[str, bytes]:
        if self._folder is None:
            return self._digest_model(model)
        adapters = set(adapter_names(self.blueprint))
        with CheckpointReader(self._folder, self.blueprint) as reader:
            return {name: self._digest(name, reader.read(name)) for name in reader.names() if name not in adapters}

    def _digest_model(self, model: RefoldForCausalLM) -> dict[str, bytes]:
        model.hold_integers()
        names = [each.name for each in target_tensors(self.blueprint) if "adapters" not in each.groups]
        found = {name: self._digest(name, model.get_parameter(name)) for name in names}
        model.settle_integers()
        return found

    def _as_held(self, name: str, tensor: Tensor) -> Tensor:
        """Returns a stored tensor in the dtype that the model has it in."""
        return tensor.to(self._dtype) if tensor.is_floating_point() and not name.endswith(SCALE) else tensor

    def _digest(self, name: str, tensor: Tensor) -> bytes:
        held = self._as_held(name, tensor.detach()).cpu().contiguous().view(-1).view(torch.uint8)
        return hashlib.sha256(held.numpy().data).digest()


def _of_depth(adapters: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f"model.depths.{index}."
    return {name: tensor for name, tensor in adapters.items() if name.startswith(prefix)}


def linear_names(model: nn.Module, linears: Iterable[str]) -> list[str]:
    """Returns the names of the modules that adapters of other libraries fit, such as PEFT's `target_modules`.

    A linear stored whole is itself such a module. Of a linear stored as two factors it is the second factor, of a
    shared basis the basis.

    Args:
        model: A folded model.
        linears: Such as `q_proj`.

    Raises:
        RefoldError: The model stores no linear of a name, or nothing of it but LoRA factors.
    """
    wanted = dict.fromkeys(linears)
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, FactoredLinear):
            found.setdefault(name, []).extend([f"{path}.b"] if module.rank else [])
        elif isinstance(module, (BasisLinear, nn.Linear)):
            found.setdefault(name, []).append(f"{path}.a" if isinstance(module, BasisLinear) else path)
    for name in wanted:
        if not found.get(name):
            others = sorted(each for each, paths in found.items() if paths and each not in ("a", "b"))
            raise RefoldError(
                f"linears: names of stored linears are required (got {name!r}{did_you_mean(name, others)}); "
                f"choose from {', '.join(others)}"
            )
    return [path for name in wanted for path in found[name]]
