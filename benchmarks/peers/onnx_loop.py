"""ONNX Runtime as a contender: a greedy loop over a graph with its cache as inputs and outputs.

    PYTHON benchmarks/peers/onnx_loop.py FOLDER THREADS

The environment needs `onnxruntime` and `numpy`. FOLDER has `onnx/model.onnx`, as `refold export --to onnx` writes
it. The rows of a batch have equal lengths.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from protocol import Answer, Request, answer_requests

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Graph:
    """A loaded graph.

    Args:
        folder: Folder of the export.
        threads: Threads of the products.
    """

    def __init__(self, folder: Path, threads: int):
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
        self.session = onnxruntime.InferenceSession(
            str(folder / "onnx" / "model.onnx"), settings, providers=["CPUExecutionProvider"]
        )
        self.inputs = {each.name: each for each in self.session.get_inputs()}
        self.past = [name for name in self.inputs if name.startswith("past_")]
        self.outputs = [each.name for each in self.session.get_outputs()]

    def run(self, request: Request) -> Answer:
        """Continues all prompts, at most `rows` at a time."""
        tokens: list[list[int]] = []
        for start in range(0, len(request.prompts), request.rows):
            rows = slice(start, start + request.rows)
            tokens += self._continue(request.prompts[rows], max(request.new[rows]))
        return Answer([row[:count] for row, count in zip(tokens, request.new, strict=True)])

    def _continue(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        caches = {name: value(self._empty(name, len(prompts))) for name in self.past}
        given, seen, found = np.array(prompts, np.int64), 0, []
        for _ in range(new):
            seen += given.shape[1]
            places = np.arange(seen - given.shape[1], seen, dtype=np.int64)[None].repeat(len(prompts), 0)
            feeds = {"input_ids": given, "attention_mask": np.ones((len(prompts), seen), np.int64)}
            feeds["position_ids"] = places
            values = {name: value(np.ascontiguousarray(each)) for name, each in feeds.items() if name in self.inputs}
            logits, *presents = self.session.run_with_ort_values(self.outputs, {**values, **caches})
            caches = dict(zip(self.past, presents, strict=True))
            given = logits.numpy()[:, -1].argmax(-1)[:, None].astype(np.int64)
            found.append(given[:, 0])
        return np.stack(found, 1).tolist()

    def _empty(self, name: str, rows: int) -> np.ndarray:
        # Dimensions with a name are the rows, in front, and the tokens so far, of which there are none.
        shape = [
            size if isinstance(size, int) else rows if place == 0 else 0
            for place, size in enumerate(self.inputs[name].shape)
        ]
        return np.zeros(shape, DTYPES[self.inputs[name].type])


if __name__ == "__main__":
    answer_requests(Graph(Path(sys.argv[1]), int(sys.argv[2])).run, version=onnxruntime.__version__)
