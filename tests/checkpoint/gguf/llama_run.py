"""Runs a GGUF file in llama.cpp: `llama_run.py FILE < request.json > answer.json`, in an environment with xllamacpp."""

import json
import sys
import urllib.request
from typing import Any

import xllamacpp  # pyright: ignore[reportMissingImports]


def ask(server: xllamacpp.Server, place: str, body: dict[str, object]) -> dict[str, Any]:
    raw = json.dumps(body).encode()
    asked = urllib.request.Request(f"{server.listening_address}/{place}", raw, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=120) as answer:
        return json.load(answer)


def main() -> None:
    request = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 256, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # Keys and values in 32 bits, as the weights.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    texts = [
        ask(server, "tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        for text in request["texts"]
    ]
    steps = ask(
        server,
        "completion",
        {
            "prompt": request["ids"],
            "n_predict": request["num_tokens"],
            "temperature": 0.0,
            "n_probs": request["vocab_size"],
            "ignore_eos": True,
            "cache_prompt": False,
        },
    )
    found = [
        {"id": step["id"], "logprobs": {each["id"]: each["logprob"] for each in step["top_logprobs"]}}
        for step in steps["completion_probabilities"]
    ]
    json.dump({"texts": texts, "steps": found}, sys.stdout)


if __name__ == "__main__":
    main()
