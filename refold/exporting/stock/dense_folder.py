"""Export as a stock checkpoint of the source's family: loops unrolled, adapters merged, tensors packed."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from refold.blueprint.integers import Scheme, find_scheme
from refold.blueprint.owned.registry import OWNED
from refold.blueprint.schema import Blueprint
from refold.blueprint.source_tensors import SourceTensor, source_tensors
from refold.blueprint.tensors import target_tensors
from refold.checkpoint.locate import CONFIG_NAME
from refold.checkpoint.writer import ShardedWriter, TensorSpecs
from refold.errors import ExportError, SourceError
from refold.exporting.compressed import choose_linears, quantization_config
from refold.exporting.stack_weights import StackWeights
from refold.exporting.target import ExportJob
from refold.exporting.unrolled import dense_arch, kept_depths
from refold.families.arch import ArchSpec, Family, Layout
from refold.families.registry import find_family
from refold.nn.rounding import Rounded, round_weight


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


def write_dense(job: ExportJob) -> tuple[str, ...]:
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
    schemes = choose_linears(tensors, job.options)
    if schemes:
        config["quantization_config"] = quantization_config(schemes, tensors)
    weights, num_copied = StackWeights(blueprint, job.reader), 0
    with ShardedWriter(job.out.path, _specs(tensors, schemes, job.dtype)) as writer:
        for name, tensor in tensors.items():
            depth = None if tensor.layer is None else kept[tensor.layer]
            if name in schemes:
                assert depth is not None
                scheme = find_scheme(schemes[name])
                rounded, is_copy = _round(tensor, weights, depth, scheme, arch.head_dim)
                num_copied += is_copy
                for suffix, value in rounded.store(scheme).items():
                    writer.write(f"{name}{suffix}", value.to(job.dtype) if suffix == "_scale" else value)
                continue
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
    notes = _notes(blueprint, arch, tensors)
    if schemes:
        told = f"{len(schemes)} linears as integers, {num_copied} of them as the model stores them"
        notes = (*notes, f"{told}; loading needs the package compressed-tensors")
    return notes


def _specs(tensors: Mapping[str, SourceTensor], schemes: Mapping[str, str], dtype: torch.dtype) -> TensorSpecs:
    """Returns name, shape and dtype of all tensors of the folder."""
    found: dict[str, tuple[Sequence[int], torch.dtype]] = {}
    for name, each in tensors.items():
        if name not in schemes:
            found[name] = (each.shape, dtype)
            continue
        rows, columns = each.shape
        for piece in find_scheme(schemes[name]).pieces(rows, columns):
            own = dtype if piece.suffix == "_scale" else getattr(torch, piece.dtype)
            found[f"{name}{piece.suffix}"] = (piece.shape, own)
    return found


def _round(
    tensor: SourceTensor, weights: StackWeights, depth: int, scheme: Scheme, head_dim: int
) -> tuple[Rounded, bool]:
    """Returns the integers of a linear, and whether they are those that the model stores."""
    layout, pieces = tensor.rule.layout, tensor.rule.pieces
    stored = [weights.read_rounded(piece, depth, scheme) for piece in pieces]
    found = [each for each in stored if each is not None]
    if len(found) == len(pieces):
        columns = zip(*(each[:3] for each in found), strict=True)
        integers, scale, zero_point = (pack_pieces(layout, column, head_dim) for column in columns)
        return Rounded(integers, scale, zero_point, found[0].columns), True
    floats = [weights.read(piece, depth, torch.float32) for piece in pieces]
    weight = pack_pieces(layout, floats, head_dim)
    return round_weight(weight, scheme, torch.ones(weight.shape[1])), False


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
