"""Writer of PEFT adapters: one LoRA for each linear of each layer of the unrolled stack."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from refold.blueprint.owned.registry import merge_at
from refold.blueprint.schema import Blueprint, Pool
from refold.blueprint.source_tensors import SourceTensor, canonical_tensors, source_tensors
from refold.exporting.opened import TensorSource
from refold.exporting.stock.dense_folder import pack_pieces, write_dense
from refold.exporting.target import ExportJob
from refold.exporting.unrolled import dense_arch, kept_depths, without_adapters
from refold.families.registry import find_family

FOLDER = "adapter"
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


class ModuleLora(NamedTuple):
    """The LoRA of one linear of the base.

    Attributes:
        module: Path of the linear, such as `model.layers.3.self_attn.q_proj`.
        a: `[rank, in]`.
        b: `[out, rank]`.
    """

    module: str
    a: Tensor
    b: Tensor


def write_base_and_adapter(job: ExportJob) -> tuple[str, ...]:
    """Writes the stock folder of the stack without LoRAs, and the adapter in a folder of it.

    Returns:
        Sentences for the model card.

    Raises:
        ExportError: The family cannot express the stack.
        SourceError: The model's files are damaged.
    """
    base = without_adapters(job.blueprint)
    loras = list(module_loras(job.blueprint, job.reader, job.dtype))
    folder = job.out.path / FOLDER
    folder.mkdir()
    tensors = {}
    for each in loras:
        path = f"base_model.model.{each.module}"
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = each.a.contiguous(), each.b.contiguous()
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = adapter_config({each.module: len(each.a) for each in loras})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    notes = write_dense(replace(job, blueprint=base))
    return (f"{len(loras)} LoRAs are in `{FOLDER}`; the weights beside it are those without LoRAs", *notes)


def adapter_config(ranks: dict[str, int]) -> dict[str, Any]:
    """Returns the content of `adapter_config.json`. The scale of every LoRA is 1.

    Args:
        ranks: Module path to rank.
    """
    (common, _), *_ = Counter(ranks.values()).most_common(1)
    others = {module: rank for module, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
    }


def module_loras(blueprint: Blueprint, reader: TensorSource, dtype: torch.dtype) -> Iterator[ModuleLora]:
    """Yields the LoRAs of the unrolled stack by module of the base.

    A family that packs several linears into one gets one LoRA of the sum of their ranks: their A one below the other,
    their B side by side with zeros between.

    Args:
        blueprint: The model's.
        reader: Reads its tensors.
        dtype: Of the results.
    """
    kept, family = kept_depths(blueprint), find_family(blueprint.arch.family)
    arch = dense_arch(without_adapters(blueprint))
    shapes = canonical_tensors(arch)
    for name, tensor in source_tensors(arch, family).items():
        if tensor.layer is None or not name.endswith(".weight"):
            continue
        pairs = _pairs(blueprint, kept[tensor.layer], tensor, reader)
        if not any(pairs):
            continue
        rank = sum(len(a) for a, _ in filter(None, pairs))
        below, blocks, begin = [], [], 0
        for piece, pair in zip(tensor.rule.pieces, pairs, strict=True):
            block = torch.zeros(shapes[piece][0], rank)
            if pair is not None:
                below.append(pair[0])
                block[:, begin : begin + len(pair[0])] = pair[1]
                begin += len(pair[0])
            blocks.append(block)
        b = pack_pieces(tensor.rule.layout, blocks, arch.head_dim)
        yield ModuleLora(name.removesuffix(".weight"), torch.cat(below).to(dtype), b.to(dtype))


def _pairs(
    blueprint: Blueprint, depth: int, tensor: SourceTensor, reader: TensorSource
) -> list[tuple[Tensor, Tensor] | None]:
    """Returns A and B in float32 for each piece of a tensor; None for pieces without a LoRA. Gains scale B."""
    found: list[tuple[Tensor, Tensor] | None] = []
    for canonical in tensor.rule.pieces:
        pool: Pool = "mixer" if canonical.startswith("mixer.") else "mlp"
        local = canonical.removeprefix(f"{pool}.")
        linear = local.removesuffix(".weight")
        if linear not in blueprint.depths[depth].ranks:
            found.append(None)
            continue
        merge = merge_at(blueprint, depth, pool, local)
        assert merge is not None
        path = f"model.depths.{depth}.lora.{linear}"
        a, b = reader.read(f"{path}.a", torch.float32), reader.read(f"{path}.b", torch.float32)
        found.append((a, b if merge.scale is None else b * reader.read(merge.scale, torch.float32)))
    return found
