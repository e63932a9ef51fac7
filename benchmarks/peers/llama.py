"""llama.cpp as a contender: its server from the wheel `xllamacpp`, asked over the loopback interface.

    PEER/bin/python benchmarks/peers/llama.py MODEL.gguf CACHE_TYPE THREADS ROWS CONTEXT

Requests of a batch are sent at the same time, as many as the rows allow; the server batches them.
"""

import json
import sys
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import xllamacpp  # pyright: ignore[reportMissingImports]
from protocol import Answer, Request, answer_requests

GREEDY = {"temperature": 0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}


class LlamaServer:
    """A running server of one file.

    Args:
        file: GGUF file.
        cache_type: Type of keys and values: `F32`, `F16` or `BF16`.
        threads: Threads of the products.
        rows: Slots, each with a cache of its own.
        context: Tokens that a slot holds.
    """

    def __init__(self, file: str, cache_type: str, threads: int, rows: int, context: int):
        settings = xllamacpp.CommonParams()
        settings.model.path = file
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type[f"GGML_TYPE_{cache_type}"]
        settings.n_parallel, settings.n_ctx = rows, rows * context
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.n_threads_http = rows + 1
        settings.kv_unified, settings.cache_ram_mib = False, 0
        settings.verbosity, settings.port = -1, 0
        self.server = xllamacpp.Server(settings)

    def run(self, request: Request) -> Answer:
        """Continues all prompts, at most `rows` at a time."""
        with ThreadPoolExecutor(request.rows) as pool:
            replies = list(pool.map(self.complete, request.prompts, request.new))
        return Answer([reply["tokens"] for reply in replies])

    def complete(self, prompt: Sequence[int], new: int) -> dict:
        """Returns the server's reply to one prompt."""
        body = {"prompt": prompt, "n_predict": new, "return_tokens": True, "cache_prompt": False, **GREEDY}
        url = f"{self.server.listening_address}/completion"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)


if __name__ == "__main__":
    file, cache_type, *numbers = sys.argv[1:]
    answer_requests(LlamaServer(file, cache_type, *map(int, numbers)).run, version=xllamacpp.__version__)
