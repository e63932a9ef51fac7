"""Configs beside a graph: `genai_config.json` for ONNX Runtime GenAI, and `config.json` for transformers.js."""

from typing import Any

from refold.blueprint.part_sizes import widest_arch
from refold.blueprint.passes import recurrent_depths
from refold.blueprint.schema import POOLS, Blueprint
from refold.errors import SourceError
from refold.exporting.onnx.limits import shares_buffers
from refold.exporting.target import ExportJob
from refold.families.arch import Layer
from refold.families.registry import find_family

CACHES = ("key", "value")


def genai_config(job: ExportJob, graph: str) -> dict[str, Any]:
    """Returns the config of ONNX Runtime GenAI.

    Args:
        job: The export.
        graph: Path of the graph in the folder.
    """
    blueprint, arch = job.blueprint, widest_arch(job.blueprint)
    tokens = special_tokens(job)
    end = tokens["eos_token_id"]
    first_end = end[0] if isinstance(end, list) else end
    # GenAI wants numbers; a model without a padding or a start token never uses them.
    pad = tokens["pad_token_id"] if tokens["pad_token_id"] is not None else (first_end or 0)
    start = tokens["bos_token_id"] if tokens["bos_token_id"] is not None else pad
    states = ("conv", "recurrent") if recurrent_depths(blueprint) else ()
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **_session_entries(job)},
        "filename": graph,
        "head_size": arch.head_dim,
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_key_value_heads,
        "num_hidden_layers": blueprint.num_depths,
        "inputs": {
            **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
            **{f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in CACHES},
            **{f"past_{kind}_names": f"past.%d.{kind}" for kind in states},
        },
        "outputs": {
            "logits": "logits",
            **{f"present_{kind}_names": f"present.%d.{kind}" for kind in (*CACHES, *states)},
        },
    }
    return {
        "model": {
            "type": "decoder",
            "vocab_size": arch.vocab_size,
            "context_length": arch.max_position_embeddings,
            "bos_token_id": start,
            "eos_token_id": end if end is not None else arch.vocab_size,
            "pad_token_id": pad,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": arch.max_position_embeddings,
            "past_present_share_buffer": shares_buffers(blueprint),
        },
    }


def _session_entries(job: ExportJob) -> dict[str, str]:
    """Returns further entries of a session.

    ONNX Runtime prepares a copy of a float weight for each operator that reads it, so tying would save no memory.
    Rounded matrices are only fast if they are prepared, and their copies are small.
    """
    blueprint = job.blueprint
    is_tied = any(len(blueprint.users(pool, i)) > 1 for pool in POOLS for i in range(len(blueprint.pool(pool))))
    is_float = job.options.quantise is None and not job.options.keeps_integers
    return {"session.disable_prepacking": "1"} if is_tied and is_float else {}


def web_config(job: ExportJob) -> dict[str, Any]:
    """Returns the `config.json` of a model of the source's family with a layer for each depth.

    transformers.js reads the sizes of the cache from it, and the tokens that begin and end a text.
    """
    arch = job.blueprint.arch
    family = find_family(arch.family)
    try:
        fields = family.write_config(arch.model_copy(update={"layers": _layers(job.blueprint)}))
    except SourceError:
        # The family cannot mix windows or ropes as this stack does; transformers.js reads neither.
        fields = family.write_config(arch)
    return {
        **fields,
        "num_hidden_layers": job.blueprint.num_depths,
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": job.options.dtype,
        **special_tokens(job),
        "transformers.js_config": {
            "dtype": "fp32",
            "use_external_data_format": True,
            "kv_cache_dtype": {"fp32": "float16" if job.options.dtype == "float16" else "float32"},
        },
    }


def special_tokens(job: ExportJob) -> dict[str, Any]:
    """Returns the ids of the tokens that begin, end and pad texts; None where the model has none."""
    return {name: job.config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _layers(blueprint: Blueprint) -> tuple[Layer, ...]:
    # A depth without a rope (no mixer, or one that does not rotate) takes window and rope of its source layer.
    return tuple(
        Layer(window=depth.window, rope=depth.rope) if depth.rope is not None else blueprint.arch.layers[depth.source]
        for depth in blueprint.depths
    )
