"""The graph of a whole model: embedding, depths, final norm and head."""

from onnx import TensorProto

from refold.blueprint.schema import Blueprint
from refold.exporting.onnx.attention import AttentionGraph
from refold.exporting.onnx.batch_values import BatchValues
from refold.exporting.onnx.depth_part import DepthPart, run_norm
from refold.exporting.onnx.graph import GraphBuilder
from refold.exporting.onnx.mixer_graphs import RECURRENT_GRAPHS
from refold.exporting.onnx.weights import GraphWeights

LOGITS = "logits"


def build_decoder(blueprint: Blueprint, graph: GraphBuilder, weights: GraphWeights) -> None:
    """Adds a model to an empty graph; exits are dropped.

    Inputs are `input_ids`, `attention_mask` and `position_ids`, and the cache of each depth that keeps one; outputs are
    `logits` [B, T, vocabulary] and the cache after the call.
    """
    arch, batch = blueprint.arch, BatchValues(graph, blueprint.arch)
    graph.add_output(LOGITS, TensorProto.FLOAT, ["batch_size", "sequence_length", arch.vocab_size])
    stream = weights.look_up("model.embed_tokens.weight", batch.input_ids)
    if arch.embedding_scale != 1.0:
        stream = graph.mul(stream, graph.number(arch.embedding_scale))
    cached: dict[int, tuple[str, str]] = {}
    for index in range(blueprint.num_depths):
        stream = _add_depth(blueprint, index, graph, weights, batch, stream, cached)
    bias = weights.vector("model.norm.bias") if arch.norm.bias else ""
    normed = run_norm(graph, arch.norm, stream, weights.vector("model.norm.weight", arch.norm.offset), bias)
    if arch.tied_head:
        logits = weights.multiply_table(normed, "model.embed_tokens.weight")
    else:
        logits = weights.multiply(normed, "lm_head.weight")
    if arch.logit_softcap is not None:
        logits = graph.soft_cap(logits, arch.logit_softcap)
    graph.named_node("Cast", (logits,), (LOGITS,), to=TensorProto.FLOAT)


def _add_depth(
    blueprint: Blueprint,
    index: int,
    graph: GraphBuilder,
    weights: GraphWeights,
    batch: BatchValues,
    stream: str,
    cached: dict[int, tuple[str, str]],
) -> str:
    """Adds mixer and MLP of a depth, either of which may be absent, and returns the stream after them."""
    depth, update = blueprint.depths[index], None
    if depth.mixer is not None:
        part, name = DepthPart(graph, weights, blueprint, index, "mixer"), blueprint.mixers[depth.mixer].mixer.type
        if name == "attention":
            update, made = AttentionGraph(part, batch).run(stream, cached)
            if made is not None:
                cached[index] = made
        else:
            update = RECURRENT_GRAPHS[name](part, batch).run(stream)
        update = part.scale(update)
    mixed = stream if update is None else graph.add(stream, update)
    if depth.mlp is None:
        return mixed
    part = DepthPart(graph, weights, blueprint, index, "mlp")
    is_parallel = blueprint.arch.residual == "parallel"
    return graph.add(mixed, part.scale(_run_mlp(part, stream if is_parallel else mixed)))


def _run_mlp(part: DepthPart, hidden_states: str) -> str:
    graph, x = part.graph, part.normalise("input_norm", hidden_states)
    inner = graph.activate(part.arch.activation, part.project("gate_proj" if part.arch.gated_mlp else "up_proj", x))
    if part.arch.gated_mlp:
        inner = graph.mul(inner, part.project("up_proj", x))
    return part.normalise("output_norm", part.project("down_proj", inner))
