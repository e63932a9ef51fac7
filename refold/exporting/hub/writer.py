"""Writes a folder with the stored weights of a model as they are, and the code that runs them."""

import json
from typing import Any

import torch

from refold.blueprint.tensors import target_tensors
from refold.checkpoint.locate import CONFIG_NAME
from refold.checkpoint.writer import ShardedWriter
from refold.exporting.hub.bundle import FILE_NAME, ROOTS, bundle
from refold.exporting.target import ExportJob
from refold.modeling.configuration import MODEL_TYPE, RefoldConfig

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_hub(job: ExportJob) -> tuple[str, ...]:
    """Writes weights, `config.json` and the generated file; one tensor is in memory at a time.

    Returns:
        Sentences for the model card.

    Raises:
        SourceError: The model's files are damaged.
    """
    tensors = {
        each.name: (each.shape, job.dtype if each.piece is None else getattr(torch, each.piece.dtype))
        for each in target_tensors(job.blueprint)
    }
    with ShardedWriter(job.out.path, tensors) as writer:
        for name, (_, dtype) in tensors.items():
            writer.write(name, job.reader.read(name, dtype))
    job.out.hashes.update(writer.hashes)
    path = job.out.path / CONFIG_NAME
    path.write_text(json.dumps(describe(job), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    kinds = frozenset(part.mixer.type for part in job.blueprint.mixers)
    (job.out.path / FILE_NAME).write_text(bundle(kinds), encoding="utf-8")
    return (
        "the stored weights of the fold, shared between depths as they are in the fold",
        f"`{FILE_NAME}` is generated code that needs torch and transformers alone: read it before you trust it",
    )


def describe(job: ExportJob) -> dict[str, Any]:
    """Returns the content of `config.json`, which names the class of the generated file for each Auto class."""
    if job.config.get("model_type") == MODEL_TYPE:
        config = RefoldConfig.from_dict(job.config)
    else:
        tokens = {name: job.config[name] for name in SPECIAL_TOKENS if job.config.get(name) is not None}
        config = RefoldConfig(
            blueprint=job.blueprint.model_dump(mode="json"), architectures=["RefoldForCausalLM"], **tokens
        )
    config.dtype = job.dtype
    module = FILE_NAME.removesuffix(".py")
    found = json.loads(config.to_json_string(use_diff=True))
    return {**found, "auto_map": {auto: f"{module}.{name}" for auto, (_, name) in ROOTS.items()}}
