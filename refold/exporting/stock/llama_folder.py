"""Folders with Llama's tensor names for engines whose configs say more about the layers than Llama's."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from refold.blueprint.owned.registry import OWNED
from refold.blueprint.tensors import target_tensors
from refold.checkpoint.locate import CONFIG_NAME
from refold.checkpoint.writer import ShardedWriter
from refold.errors import ExportError
from refold.exporting.llama_shaped import StoredLayer, llama_fields, stored_tensors
from refold.exporting.stack_weights import StackWeights
from refold.exporting.target import ExportJob
from refold.exporting.unrolled import dense_arch

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_llama_folder(job: ExportJob, layers: Sequence[StoredLayer], fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Writes weights and `config.json`; one tensor is in memory at a time.

    Args:
        job: The model and the folder.
        layers: The layers to store.
        fields: Fields of the config beside Llama's.

    Returns:
        Sentences for the model card.

    Raises:
        ExportError: A tensor of the model has no place.
        SourceError: The model's files are damaged.
    """
    arch = dense_arch(job.blueprint)
    tensors = dict(stored_tensors(arch, layers))
    weights = StackWeights(job.blueprint, job.reader, pads=all(layer.arch is None for layer in layers))
    with ShardedWriter(job.out.path, {name: (each.shape, job.dtype) for name, each in tensors.items()}) as writer:
        for name, each in tensors.items():
            writer.write(name, weights.read(each.canonical, each.depth, job.dtype))
    exits = {tensor.name for tensor in target_tensors(job.blueprint) if tensor.kind.place == "exits"}
    unread = [name for name in job.reader.unread() if name not in exits]
    if unread:
        raise ExportError(
            f"export: {len(unread)} of the model's tensors have no place: {', '.join(unread[:5])}; convert the source "
            f"again"
        )
    job.out.hashes.update(writer.hashes)
    config = {
        **llama_fields(arch, len(layers)),
        **fields,
        "dtype": str(job.dtype).removeprefix("torch."),
        "torch_dtype": str(job.dtype).removeprefix("torch."),
        **{name: job.config.get(name) for name in SPECIAL_IDS},
        "transformers_version": version("transformers"),
        "use_cache": True,
    }
    (job.out.path / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return tuple(sentence for kind in OWNED for sentence in kind.lost(job.blueprint))
