"""CTranslate2 as a contender, and the conversion of a Llama folder to its format.

    PEER/bin/python benchmarks/peers/ctranslate.py MODEL OUT THREADS COMPUTE_TYPE

The environment needs `ctranslate2`, `numpy` and `safetensors`. OUT is made at the first run, in float32; `int8`
quantises while loading.
"""

import json
import shutil
import sys
from pathlib import Path

import ctranslate2  # pyright: ignore[reportMissingImports]
import numpy as np
from ctranslate2.specs import common_spec, transformer_spec  # pyright: ignore[reportMissingImports]
from protocol import Answer, Request, answer_requests
from source_tensors import read_tensors


def convert(folder: Path, out: Path) -> None:
    """Writes a Llama folder in CTranslate2's format, with tokens named by their numbers."""
    config = json.loads((folder / "config.json").read_text())
    weights = read_tensors(folder)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config["num_hidden_layers"],
        heads,
        activation=common_spec.Activation.SWISH,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        rotary_base=float((config.get("rope_parameters") or config).get("rope_theta", 10_000.0)),
        num_heads_kv=None if groups == heads else groups,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    embedding = weights["model.embed_tokens.weight"]
    decoder.embeddings.weight = embedding
    decoder.projection.weight = weights.get("lm_head.weight", embedding)
    decoder.layer_norm.gamma = weights["model.norm.weight"]
    for index, layer in enumerate(decoder.layer):
        part = {
            name.split(".", 3)[3].removesuffix(".weight"): weight
            for name, weight in weights.items()
            if name.startswith(f"model.layers.{index}.")
        }
        layer.self_attention.layer_norm.gamma = part["input_layernorm"]
        layer.self_attention.linear[0].weight = np.concatenate([part[f"self_attn.{each}_proj"] for each in "qkv"])
        layer.self_attention.linear[1].weight = part["self_attn.o_proj"]
        layer.ffn.layer_norm.gamma = part["post_attention_layernorm"]
        layer.ffn.linear_0.weight = part["mlp.gate_proj"]
        layer.ffn.linear_0_noact.weight = part["mlp.up_proj"]
        layer.ffn.linear_1.weight = part["mlp.down_proj"]
    spec.register_vocabulary([str(index) for index in range(config["vocab_size"])])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.config.layer_norm_epsilon = config["rms_norm_eps"]
    spec.validate()
    spec.optimize()
    part_folder = out.with_suffix(".part")
    shutil.rmtree(part_folder, ignore_errors=True)
    part_folder.mkdir(parents=True)
    spec.save(str(part_folder))
    part_folder.rename(out)


class Translator:
    """A loaded model.

    Args:
        folder: Model in CTranslate2's format.
        threads: Threads of the products.
        compute_type: `float32`, `int8`, `int8_float32` and others that the processor has.
    """

    def __init__(self, folder: Path, threads: int, compute_type: str):
        self.generator = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=threads
        )

    def run(self, request: Request) -> Answer:
        """Continues prompts in batches of `rows`: the engine has no continuous batching.

        A batch is sorted by length by the engine. All its rows run as long as the longest, as with padded `generate`.
        """
        tokens: list[list[int]] = []
        for start in range(0, len(request.prompts), request.rows):
            prompts, new = request.prompts[start : start + request.rows], request.new[start : start + request.rows]
            results = self.generator.generate_batch(
                [[str(token) for token in prompt] for prompt in prompts],
                max_batch_size=request.rows,
                batch_type="examples",
                max_length=max(new),
                min_length=max(new),
                beam_size=1,
                sampling_topk=1,
                include_prompt_in_result=False,
                end_token=[],
            )
            tokens += [list(result.sequences_ids[0])[:count] for result, count in zip(results, new, strict=True)]
        return Answer(tokens)


if __name__ == "__main__":
    model, out = map(Path, sys.argv[1:3])
    if not out.exists():
        convert(model, out)
    answer_requests(Translator(out, int(sys.argv[3]), sys.argv[4]).run, version=ctranslate2.__version__)
