"""The folder of an ONNX export: the graph, its weights, and configs for ONNX Runtime GenAI and transformers.js."""

import json
from contextlib import ExitStack

from refold.blueprint.tensors import target_tensors
from refold.checkpoint.locate import CONFIG_NAME
from refold.errors import ExportError
from refold.exporting.onnx.limits import runtime_limits
from refold.exporting.onnx.runtime_configs import genai_config, web_config
from refold.exporting.onnx.storage import FORMATS, Storage
from refold.exporting.target import ExportJob

GRAPH_FOLDER = "onnx"
"""Where transformers.js looks for graphs."""
GRAPH_NAME = "model.onnx"


def write_onnx(job: ExportJob) -> tuple[str, ...]:
    """Writes the graph, the file of its weights and the configs; one matrix is in memory at a time.

    Returns:
        Sentences for the model card.

    Raises:
        ExportError: The package `onnx` is missing, or a tensor of the model is not part of its blueprint.
        SourceError: The model's files are damaged.
    """
    _require_onnx()
    from onnx import TensorProto

    from refold.exporting.onnx.decoder import build_decoder
    from refold.exporting.onnx.graph import GraphBuilder
    from refold.exporting.onnx.weights import DATA_NAME, GraphWeights

    blueprint, folder = job.blueprint, job.out.path / GRAPH_FOLDER
    folder.mkdir()
    storage = Storage(blueprint, job.options)
    graph = GraphBuilder(TensorProto.FLOAT16 if job.options.dtype == "float16" else TensorProto.FLOAT)
    with ExitStack() as stack:
        weights = GraphWeights(graph, job.reader, storage, folder)
        stack.callback(weights.close)
        build_decoder(blueprint, graph, weights)
    job.out.hashes[f"{GRAPH_FOLDER}/{DATA_NAME}"] = weights.sha256
    (folder / GRAPH_NAME).write_bytes(graph.model().SerializeToString())
    exits = {tensor.name for tensor in target_tensors(blueprint) if tensor.kind.place == "exits"}
    unread = [name for name in job.reader.unread() if name not in exits]
    if unread:
        raise ExportError(
            f"export: {len(unread)} of the model's tensors have no place: {', '.join(unread[:5])}; convert the source "
            f"again"
        )
    limits = runtime_limits(blueprint)
    _write_json(job, CONFIG_NAME, web_config(job))
    if not limits.genai:
        _write_json(job, "genai_config.json", genai_config(job, f"{GRAPH_FOLDER}/{GRAPH_NAME}"))
    copied = f"{weights.num_copied} matrices have the model's own integers, which were not rounded again"
    return (*storage.notes(), *[copied] * (weights.num_copied > 0), *_notes(job), *limits.sentences())


def _write_json(job: ExportJob, name: str, content: dict) -> None:
    (job.out.path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _notes(job: ExportJob) -> list[str]:
    notes = ["tied weights are stored once, and every depth that uses them reads them"]
    quantise, dtype = job.options.quantise, job.options.dtype
    if quantise is not None:
        notes.append(
            f"matrices are {FORMATS[quantise].bits}-bit integers in blocks of 32 with float16 scales; LoRAs beside a "
            f"stored weight, norms and biases are {dtype}"
        )
    if dtype == "bfloat16":
        notes.append("weights are stored as bfloat16 and computed with in float32")
    if any(depth.exit is not None for depth in job.blueprint.depths):
        notes.append("a graph has no early exits: they are dropped")
    return notes


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"export: the package onnx is required by --to onnx (got {error}); pip install 'refold[onnx]'"
        ) from None
