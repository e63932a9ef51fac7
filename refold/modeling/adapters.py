"""Adapters of folds: loading another set for the same stored blocks, and naming linears for other adapter libraries."""

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from torch import nn

from refold.blueprint.tensors import target_tensors
from refold.checkpoint.finite import require_finite
from refold.checkpoint.locate import Source
from refold.checkpoint.reader import CheckpointReader
from refold.errors import FolderError, RefoldError
from refold.modeling.load import open_source
from refold.modeling.model import RefoldForCausalLM
from refold.nn.factored import BasisLinear, FactoredLinear
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
    blueprint = model.config.read_blueprint()
    tensors = list(target_tensors(blueprint))
    adapters = {each.name for each in tensors if "adapters" in each.groups}
    if not adapters:
        raise RefoldError("adapters: a model that has some is required (it has none); convert with a `relax` section")
    _, folder = open_source(source)
    with CheckpointReader(folder, blueprint) as reader:
        stored = {name: tuple(reader.info(name).shape) for name in reader.names()}
        wanted = {each.name: each.shape for each in tensors}
        different = sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name))
        if different:
            raise FolderError(
                f"{folder}: adapters of this model's blueprint are required ({len(different)} tensors have another "
                f"name or shape, such as {different[0]}); fold both with one recipe"
            )
        for name in sorted(stored.keys() - adapters):
            own = model.get_parameter(name)
            if not torch.equal(own, reader.read(name).to(own.device, own.dtype)):
                raise FolderError(
                    f"{folder}: adapters trained on this model's blocks are required ({name} differs); heal them from "
                    f"this model with `train: [adapters]`"
                )
        for name in sorted(adapters):
            own = cast("nn.Parameter", model.get_parameter(name))
            found = reader.read(name)
            require_finite(found, name, str(folder), FolderError, "heal the adapters again")
            own.copy_(found.to(own.device, own.dtype))
    model.settle_integers()
    return len(adapters)


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
