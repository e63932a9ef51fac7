"""Runs GGUF files in llama.cpp: reads jobs as JSON from stdin, writes answers as JSON to the file `ANSWERS`.

It runs in the environment that `REFOLD_LLAMA_PYTHON` names, which has xllamacpp but not refold. Everything is float32
on one thread, the cache too.
"""

import json
import os
import sys
import urllib.request

import xllamacpp  # pyright: ignore[reportMissingImports]

FLOAT32 = xllamacpp.ggml_type.GGML_TYPE_F32


def open_server(job):
    parameters = xllamacpp.CommonParams()
    parameters.model.path = job["model"]
    parameters.n_ctx, parameters.n_parallel = job.get("context", 256), 1
    parameters.cache_type_k = parameters.cache_type_v = FLOAT32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.warmup = parameters.fit_params = False
    parameters.verbosity = -1
    if "lora" in job:
        adapter = xllamacpp.CommonAdapterLoraInfo(job["lora"], 1.0)
        parameters.lora_adapters = [adapter]
    return xllamacpp.Server(parameters)


def post(server, path, request):
    headers = {"Content-Type": "application/json"}
    told = urllib.request.Request(f"{server.listening_address}{path}", json.dumps(request).encode(), headers)
    with urllib.request.urlopen(told) as answer:
        return json.load(answer)


def complete(server, prompt, num_tokens, num_probs):
    return post(
        server,
        "/completion",
        {
            "prompt": prompt,
            "n_predict": num_tokens,
            "temperature": 0.0,
            "top_k": 1,
            "n_probs": num_probs,
            "cache_prompt": False,
            "ignore_eos": True,
            "return_tokens": True,
        },
    )


def tokenize(server, text):
    return post(server, "/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]


def answer(job):
    server = open_server(job)
    found = {"tokens": [], "logprobs": [], "texts": []}
    for prompt in job.get("prompts", []):
        found["tokens"].append(complete(server, prompt, job["num_tokens"], 0)["tokens"])
        first = complete(server, prompt, 1, job["vocab_size"])["completion_probabilities"][0]
        by_id = {each["id"]: each["logprob"] for each in first["top_logprobs"]}
        found["logprobs"].append([by_id.get(index) for index in range(job["vocab_size"])])
    found["texts"] = [tokenize(server, text) for text in job.get("texts", [])]
    return found


if __name__ == "__main__":
    answers = [answer(job) for job in json.load(sys.stdin)]
    # Logs of the engine go to stdout too: the answers go to a file of their own.
    with open(os.environ["ANSWERS"], "w", encoding="utf-8") as out:
        json.dump(answers, out)
