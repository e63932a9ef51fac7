"""Second moments of inputs and gradients of a source's linears on text, measured layer by layer and kept on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from refold.calibration.layers import SourceLayers
from refold.calibration.weighting import Moments
from refold.checkpoint.atomic_file import write_json
from refold.checkpoint.locate import is_same_source
from refold.checkpoint.tensor_file import write_tensors
from refold.data.packing import PackedSequence
from refold.errors import SourceError

SIGNATURE_NAME = "moments.json"
SAMPLES_AT_ONCE = 512
"""Tokens whose logits are in memory at a time."""


class MomentStore:
    """Moments of all linears, in one file for each layer; the moments of one layer are in memory at a time.

    Linears with the same input, such as queries, keys and values, share its moment.

    Args:
        folder: An existing folder, with or without moments.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def write(
        self, layer: int, inputs: dict[str, Tensor], shared: dict[str, str], outputs: dict[str, Tensor] | None
    ) -> None:
        """Stores the moments of one layer.

        Args:
            layer: Index of the layer.
            inputs: Moment of each input, by the first linear that reads the input.
            shared: For each linear, the first linear with the same input.
            outputs: Moment of the gradients by linear.
        """
        tensors = {f"inputs.{name}": value.float() for name, value in inputs.items()}
        tensors |= {f"outputs.{name}": value.float() for name, value in (outputs or {}).items()}
        write_tensors(self._path(layer), tensors, {"shared": json.dumps(shared)})

    def read(self, layer: int, linear: str) -> Moments:
        """Returns the moments of one linear, float32 on the CPU."""
        with safe_open(self._path(layer), framework="pt") as file:
            shared = json.loads(file.metadata()["shared"])
            has_outputs = f"outputs.{linear}" in file.keys()  # noqa: SIM118
            return Moments(
                file.get_tensor(f"inputs.{shared[linear]}"),
                file.get_tensor(f"outputs.{linear}") if has_outputs else None,
            )

    def sign(self, source: dict[str, Any], tokens: int, text: str) -> None:
        """Records the source and the text of the moments, so that they can be used again; written last.

        Args:
            source: The source's fingerprint.
            tokens: Number of tokens.
            text: Name of the text.
        """
        write_json(self.folder / SIGNATURE_NAME, {"source": source, "tokens": tokens, "text": text})

    def check(self, source: dict[str, Any], with_gradients: bool) -> None:
        """Checks that the moments are complete and those of a source.

        Raises:
            SourceError: They are missing, incomplete or another source's.
        """
        try:
            signed = json.loads((self.folder / SIGNATURE_NAME).read_text(encoding="utf-8"))
            with safe_open(self._path(0), framework="pt") as file:
                has_gradients = any(name.startswith("outputs.") for name in file.keys())  # noqa: SIM118
        except (OSError, ValueError) as error:
            raise SourceError(
                f"{self.folder}: a folder of moments is required ({str(error)[:80]}); measure them again"
            ) from None
        if not is_same_source(signed["source"], source):
            raise SourceError(f"{self.folder}: moments of this source are required (they are another's); measure them")
        if with_gradients and not has_gradients:
            raise SourceError(f"{self.folder}: moments of gradients are required for `weight: fisher` (none there)")

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:04d}.safetensors"


class MomentSums:
    """Sums of x x^T over tokens for the linears of one layer; linears with the same input share a sum."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.shared: dict[str, str] = {}
        self.outputs: dict[str, Tensor] = {}
        self._last: tuple[str, Tensor] | None = None

    def see_input(self, layer: int, linear: str, x: Tensor) -> None:
        # Linears that share an input are called one after the other with the same tensor object.
        if self._last is not None and self._last[1] is x:
            self.shared[linear] = self._last[0]
            return
        self._last = (linear, x)
        self.shared[linear] = linear
        _add(self.inputs, linear, x)

    def see_gradient(self, layer: int, linear: str, g: Tensor) -> None:
        _add(self.outputs, linear, g)

    def store(self, store: MomentStore, layer: int, tokens: int) -> None:
        """Divides the sums by the number of tokens and stores them."""
        self.divide(tokens)
        store.write(layer, self.inputs, self.shared, self.outputs or None)

    def divide(self, tokens: int) -> None:
        """Divides the sums by the number of tokens."""
        for each in (self.inputs, self.outputs):
            for value in each.values():
                value.div_(tokens)


def _add(sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
    flat = rows.detach().flatten(0, -2).float()
    if name in sums:
        # In place: the product of a wide MLP's inputs is half a gigabyte.
        sums[name].addmm_(flat.T, flat)
    else:
        sums[name] = flat.T @ flat


def measure_moments(
    layers: SourceLayers,
    sequences: PackedSequence,
    store: MomentStore,
    scratch: Path,
    *,
    with_gradients: bool,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Runs text through a source layer by layer and stores the moments of every linear.

    Labels are drawn from the model's own predictions, so that the second moment of the gradients is the Fisher matrix.
    For the backward pass the residual stream before each layer is kept on disk, and layers are loaded again from the
    last to the first.

    Args:
        layers: Layers of the source.
        sequences: Packed tokens.
        store: Store of the moments.
        scratch: An existing folder for residual streams, which are deleted again.
        with_gradients: Whether gradients are measured too.
        seed: Seed of the labels.
        progress: Called with the number of layers that have run, forwards or backwards.
    """
    tokens, last = sequences.input_ids.numel(), layers.arch.num_layers - 1
    hidden = layers.embed(sequences.input_ids)
    done = 0
    for index in range(last + 1):
        layer, sums = layers.load(index), MomentSums()
        if with_gradients:
            save_file({"stream": hidden.contiguous()}, _stream(scratch, index))
        hidden = layer.run(hidden, sequences.position_ids, None if with_gradients else sums.see_input)
        if not with_gradients:
            sums.store(store, index, tokens)
        del layer, sums
        progress(done := done + 1)
    if not with_gradients:
        return
    gradient = _loss_gradient(layers, hidden, seed)
    for index in range(last, -1, -1):
        layer, sums = layers.load(index), MomentSums()
        with safe_open(_stream(scratch, index), framework="pt") as file:
            hidden = file.get_tensor("stream")
        gradient = layer.run_back(hidden, sequences.position_ids, gradient, sums.see_input, sums.see_gradient)
        _stream(scratch, index).unlink()
        sums.store(store, index, tokens)
        del layer, sums  # Before the next layer is loaded: of a 7B model the two hold three gigabytes.
        progress(done := done + 1)


def _stream(scratch: Path, layer: int) -> Path:
    return scratch / f"stream-{layer:04d}.safetensors"


def _loss_gradient(layers: SourceLayers, hidden: Float[Tensor, "B T D"], seed: int) -> Float[Tensor, "B T D"]:
    """Returns the gradient of each token's cross-entropy, on a label drawn from its prediction, at the last stream."""
    generator = torch.Generator().manual_seed(seed)
    flat = hidden.flatten(0, 1)
    found = torch.empty_like(flat)
    ending = layers.load_ending()
    for first in range(0, len(flat), SAMPLES_AT_ONCE):
        rows = slice(first, first + SAMPLES_AT_ONCE)
        states = flat[rows].clone().requires_grad_()
        with torch.enable_grad():
            logits = ending(states)
            chances = logits.detach().softmax(dim=-1)
            labels = torch.multinomial(chances, 1, generator=generator).squeeze(-1)
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        assert states.grad is not None
        found[rows] = states.grad
    return found.view_as(hidden)
