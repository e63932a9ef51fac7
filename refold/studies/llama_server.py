"""llama.cpp as a contender, where the package `xllamacpp` is installed and a GGUF file lies beside the model."""

import importlib.util
import json
import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from refold.studies.contender import Contender, Served
from refold.studies.workload import Job, Workload

GREEDY = {"temperature": 0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}
PACKAGE = "xllamacpp"


class LlamaContender(Contender):
    """llama.cpp's server in this process, asked over the loopback interface.

    Args:
        file: GGUF file.
        rows: Maximal number of requests that run at the same time.
        context: Maximal number of tokens of a request.
    """

    def __init__(self, file: Path, rows: int, context: int):
        import xllamacpp  # pyright: ignore[reportMissingImports]

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_parallel, settings.n_ctx = rows, rows * context
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
        settings.n_threads_http = rows + 1
        settings.kv_unified, settings.cache_ram_mib = False, 0
        settings.verbosity, settings.port = -1, 0
        self._server: Any = xllamacpp.Server(settings)

    def serve(self, workload: Workload) -> list[Served]:
        begun = time.perf_counter()
        waits = workload.jobs[-1].arrival > 0
        with ThreadPoolExecutor(len(workload.jobs) if waits else workload.rows) as pool:
            return list(pool.map(lambda job: self._answer(job, begun), workload.jobs))

    def close(self) -> None:
        self._server = None

    def _answer(self, job: Job, begun: float) -> Served:
        time.sleep(max(0.0, begun + job.arrival - time.perf_counter()))
        body = {"prompt": job.prompt, "n_predict": job.num_new, "return_tokens": True, "cache_prompt": False}
        request = urllib.request.Request(
            f"{self._server.listening_address}/completion",
            json.dumps({**body, **GREEDY, "stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        tokens: list[int] = []
        first = last = 0.0
        with urllib.request.urlopen(request) as reply:
            for line in reply:
                if not line.startswith(b"data: {"):
                    continue
                made = json.loads(line[len(b"data: ") :]).get("tokens", [])
                if made:
                    last = time.perf_counter() - begun - job.arrival
                    first = first or last
                    tokens += made
        return Served(tuple(tokens), first, last)


def find_gguf(folder: Path) -> Path | str:
    """Returns the GGUF file beside a model, or the reason why llama.cpp cannot run."""
    if importlib.util.find_spec(PACKAGE) is None:
        return f"llama.cpp: not measured: the package {PACKAGE} is not installed"
    files = sorted(folder.glob("*.gguf")) if os.path.isdir(folder) else []
    return files[0] if files else f"llama.cpp: not measured: {folder} has no .gguf file"
