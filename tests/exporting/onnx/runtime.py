"""Runs exported graphs in ONNX Runtime, and models beside them."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROMPT_TOKENS = 12


class Graph:
    """A graph in ONNX Runtime, with the cache of the last call.

    Args:
        folder: The exported folder.
    """

    def __init__(self, folder: Path):
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = 1, 3
        file = str(folder / "onnx" / "model.onnx")
        self.session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
        self.inputs = {each.name: each for each in self.session.get_inputs()}
        self.outputs = [each.name for each in self.session.get_outputs()]
        self._cache: dict[str, np.ndarray] = {}

    def forget(self) -> None:
        """Begins new texts."""
        self._cache = {}

    def __call__(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Returns the logits of tokens `[B, T]` that go on with those of earlier calls; the mask covers all of them."""
        mask = np.ones_like(tokens) if mask is None else mask
        places = np.maximum(mask.cumsum(1) - 1, 0)[:, -tokens.shape[1] :]
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": places}
        given |= {name: self._past(name, len(tokens)) for name in self.inputs if name.startswith("past")}
        found: Any = self.session.run(self.outputs, {name: given[name] for name in self.inputs})
        answers = dict(zip(self.outputs, found, strict=True))
        self._cache = answers
        return answers["logits"]

    def _past(self, name: str, rows: int) -> np.ndarray:
        present = name.replace("past_key_values.", "present.").replace("past.", "present.")
        if present in self._cache:
            return self._cache[present]
        each = self.inputs[name]
        shape = [rows if size == "batch_size" else 0 if isinstance(size, str) else size for size in each.shape]
        return np.zeros(shape, np.float16 if "float16" in each.type else np.float32)

    def continue_greedily(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Returns the tokens that follow a prompt."""
        self.forget()
        found: list[int] = []
        given = np.array([list(prompt)])
        for length in range(len(prompt), len(prompt) + num_tokens):
            logits = self(given, np.ones((1, length), np.int64))
            found.append(int(logits[0, -1].argmax()))
            given = np.array([found[-1:]])
        return found


def padded_tokens(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens `[2, T]` and their mask; the second row begins with padding."""
    tokens = np.random.default_rng(0).integers(3, vocab_size, (2, 19))
    mask = np.ones_like(tokens)
    mask[1, :5] = 0
    return tokens, mask


def model_logits(model: Any, tokens: np.ndarray, mask: np.ndarray, steps: Sequence[int] = ()) -> np.ndarray:
    """Returns the logits of a model, in one call, or in calls that end at the given places."""
    places, cache = np.maximum(mask.cumsum(1) - 1, 0), None
    found = []
    for start, stop in pairwise(steps or (0, tokens.shape[1])):
        given = {
            "input_ids": tokens[:, start:stop],
            "attention_mask": mask[:, :stop],
            "position_ids": places[:, start:stop],
        }
        tensors = {name: torch.tensor(each) for name, each in given.items()}
        with torch.inference_mode():
            answer = model(**tensors, past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        found.append(answer.logits.float().numpy())
    return np.concatenate(found, axis=1)


def largest_error(found: np.ndarray, wanted: np.ndarray, mask: np.ndarray) -> float:
    """Returns the largest difference at tokens, as a share of the largest logit."""
    real = mask.astype(bool)
    return float(np.abs(found - wanted)[real].max() / np.abs(wanted[real]).max())
