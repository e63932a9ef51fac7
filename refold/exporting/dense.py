"""Export as a stock checkpoint of the source's family: loops unrolled, adapters merged, tensors packed."""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from refold.blueprint.owned.registry import OWNED
from refold.blueprint.schema import Blueprint, DepthSpec
from refold.blueprint.source_tensors import SourceTensor, source_tensors
from refold.blueprint.tensors import target_tensors
from refold.checkpoint.card import STOCK_USAGE
from refold.checkpoint.locate import CONFIG_NAME
from refold.checkpoint.writer import ShardedWriter
from refold.errors import ExportError, SourceError
from refold.exporting.merging import DepthWeights
from refold.exporting.target import ExportJob, ExportTarget
from refold.families.arch import ArchSpec, Family, Layer, Layout
from refold.families.registry import find_family


def pack_pieces(layout: Layout, pieces: Sequence[Tensor], head_dim: int) -> Tensor:
    """Packs the canonical pieces of one source tensor.

    Args:
        layout: Layout of the pieces in the source tensor.
        pieces: The pieces in the rule's order, weights `[rows, columns]` or biases `[rows]`.
        head_dim: Number of rows of one head, for the layout `heads`.
    """
    if layout == "whole":
        (piece,) = pieces
        return piece
    if layout == "rows":
        return torch.cat(tuple(pieces))
    # Rows in the order [heads, pieces, head_dim], as GPT-NeoX packs query, key and value.
    return torch.stack([piece.unflatten(0, (-1, head_dim)) for piece in pieces], dim=1).flatten(0, 2)


SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write(job: ExportJob) -> tuple[str, ...]:
    """Writes weights and `config.json`; a few matrices are in memory at a time.

    Depths without parts are dropped. Stock layers always have a mixer and an MLP, so a missing part becomes one whose
    output projection is zero. The result is exact, but the part takes its full size.

    Returns:
        Sentences for the model card.

    Raises:
        ExportError: The family cannot express the stack, or a tensor of the model is not part of its blueprint.
        SourceError: The model's files are damaged.
    """
    blueprint, family = job.blueprint, find_family(job.blueprint.arch.family)
    kept = kept_depths(blueprint)
    arch = dense_arch(blueprint)
    config = _config(job, arch, family)
    tensors = source_tensors(arch, family)
    weights = DepthWeights(blueprint, job.reader)
    with ShardedWriter(job.out.path, {name: (each.shape, job.dtype) for name, each in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            depth = None if tensor.layer is None else kept[tensor.layer]
            pieces = [weights.read(piece, depth, job.dtype) for piece in tensor.rule.pieces]
            writer.write(name, pack_pieces(tensor.rule.layout, pieces, arch.head_dim))
    exits = {tensor.name for tensor in target_tensors(blueprint) if tensor.kind.place == "exits"}
    unread = [name for name in job.reader.unread() if name not in exits]
    if unread:
        raise ExportError(
            f"export: {len(unread)} of the model's tensors have no place: {', '.join(unread[:5])}; convert the source "
            f"again"
        )
    job.out.hashes.update(writer.hashes)
    (job.out.path / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return _notes(blueprint, arch, tensors)


def kept_depths(blueprint: Blueprint) -> tuple[int, ...]:
    """Returns the depths that have a part, in order: the layers of the export."""
    return tuple(
        index for index, depth in enumerate(blueprint.depths) if depth.mixer is not None or depth.mlp is not None
    )


def dense_arch(blueprint: Blueprint) -> ArchSpec:
    """Returns the architecture of the unrolled stack.

    Raises:
        ExportError: No depth has a part; or a depth has another mixer than attention, reads keys and values of another
            depth, or owns tensors that no stock model has, such as a prefix.
    """
    foreign = {
        index: blueprint.mixers[depth.mixer].mixer.type
        for index, depth in enumerate(blueprint.depths)
        if depth.mixer is not None and not blueprint.mixers[depth.mixer].mixer.is_native
    }
    family = blueprint.arch.family
    if foreign:
        named = ", ".join(f"depth {index}: {name}" for index, name in foreign.items())
        raise ExportError(f"export: attention at every depth is required by {family} (got {named}); keep the folder")
    reader = next((index for index, depth in enumerate(blueprint.depths) if depth.kv), None)
    if reader is not None:
        raise ExportError(
            f"export: keys and values of its own at every depth are required by {family} (depth {reader} reads those "
            f"of depth {blueprint.depths[reader].kv[0].depth}); keep the folder"
        )
    for required, fact in (found for kind in OWNED if (found := kind.obstacle(blueprint)) is not None):
        raise ExportError(f"export: {required} is required by {family} ({fact}); keep the folder")
    depths = [blueprint.depths[index] for index in kept_depths(blueprint)]
    if not depths:
        raise ExportError(f"export: a depth with a mixer or an MLP is required by {family} (all are dropped)")
    # A depth without attention takes window and rope of a depth with attention.
    mixing = next((depth for depth in depths if depth.mixer is not None), depths[0])
    layers = tuple(_layer(depth if depth.mixer is not None else mixing) for depth in depths)
    return blueprint.arch.model_copy(update={"layers": layers})


def count_dense_bytes(blueprint: Blueprint, number_bytes: int) -> int:
    """Returns the bytes of weights of the unrolled stack."""
    arch = dense_arch(blueprint)
    tensors = source_tensors(arch, find_family(arch.family)).values()
    return number_bytes * sum(math.prod(each.shape) for each in tensors)


def _layer(depth: DepthSpec) -> Layer:
    return Layer(window=depth.window, rope=depth.rope)


def _config(job: ExportJob, arch: ArchSpec, family: Family) -> dict[str, Any]:
    try:
        fields = family.write_config(arch)
    except SourceError as error:
        raise ExportError(f"export: {error}; keep the folder") from error
    return {
        **fields,
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": str(job.dtype).removeprefix("torch."),
        # Written even if the value is None, because stock configs have other defaults.
        **{name: job.config.get(name) for name in SPECIAL_TOKENS},
        "transformers_version": version("transformers"),
        "use_cache": True,
    }


def _notes(blueprint: Blueprint, arch: ArchSpec, tensors: Mapping[str, SourceTensor]) -> tuple[str, ...]:
    notes = [f"{arch.num_layers} layers, each with its own weights: tied weights are repeated"]
    left_out = blueprint.num_depths - arch.num_layers
    if left_out:
        notes.append(f"{left_out} of {blueprint.num_depths} depths have no parts and are dropped")
    for pool, linear in (("mixer", "o_proj"), ("mlp", "down_proj")):
        idle = [index for index in kept_depths(blueprint) if getattr(blueprint.depths[index], pool) is None]
        if idle:
            names = ", ".join(str(index) for index in idle)
            what = "attention" if pool == "mixer" else "MLP"
            notes.append(
                f"depths {names} of the folded model have no {what}; here they have one whose {linear} is zero, "
                f"because {arch.family} layers always have both: exact, but nothing is saved there"
            )
    return (*notes, *(lost for kind in OWNED for lost in kind.lost(blueprint)))


TARGET = ExportTarget(
    name="dense",
    url="https://huggingface.co/docs/transformers/model_doc/auto",
    summary="stock transformers folder of the source's family, loops unrolled and LoRAs merged: loads without refold",
    usage=STOCK_USAGE,
    count_bytes=count_dense_bytes,
    write=write,
)
