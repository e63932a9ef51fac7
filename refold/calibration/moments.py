"""Second moments of inputs and gradients of a source's linears on text, measured layer by layer and kept on disk."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
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


@dataclass(frozen=True)
class Shrinkage:
    """The strength by which the moments of each linear shrink.

    Attributes:
        default: Strength of linears that are not listed.
        strengths: Strength by source layer and linear.
    """

    default: float = 0.0
    strengths: Mapping[tuple[int, str], float] = field(default_factory=dict)

    def of(self, layer: int, linear: str) -> float:
        """Returns the strength for a linear of a source layer."""
        return self.strengths.get((layer, linear), self.default)


class MomentStore:
    """Moments of all linears, in one file for each layer; the moments of one layer are in memory at a time.

    Linears with the same input, such as queries, keys and values, share its moment. Moments may be stored by folds of
    the text, which takes the disk and, while a layer is measured, the memory of as many moments. Folds can be mixed
    with other shares than those of the text, and a fit on some can be checked on the others.

    Args:
        folder: An existing folder, with or without moments.
        shrinkage: Strengths by which `read` shrinks moments; None: as measured.
        folds: Fold of each sequence that will be measured, from 0; None: the moments are not stored by folds.
    """

    def __init__(self, folder: Path, shrinkage: Shrinkage | None = None, folds: Int[Tensor, " B"] | None = None):
        self.folder, self.shrinkage, self.folds = folder, shrinkage, folds

    def write(
        self,
        layer: int,
        inputs: dict[str, Tensor],
        shared: dict[str, str],
        outputs: dict[str, Tensor] | None,
        tokens: Sequence[int] = (),
    ) -> None:
        """Stores the moments of one layer.

        Args:
            layer: Index of the layer.
            inputs: Moment of each input, by the first linear that reads the input: `[in, in]`, or `[F, in, in]` with a
                moment for each of F folds.
            shared: For each linear, the first linear with the same input.
            outputs: Moment of the gradients by linear, likewise.
            tokens: Number of tokens of each fold; empty without folds.
        """
        tensors = {f"inputs.{name}": value.float() for name, value in inputs.items()}
        tensors |= {f"outputs.{name}": value.float() for name, value in (outputs or {}).items()}
        folds = {"tokens": json.dumps(list(tokens))} if tokens else {}
        write_tensors(self._path(layer), tensors, {"shared": json.dumps(shared), **folds})

    def read(self, layer: int, linear: str) -> Moments:
        """Returns the moments of one linear over all of the text, shrunk, float32 on the CPU."""
        found = self.read_folds(layer, linear)
        return found if self.shrinkage is None else found.shrink(self.shrinkage.of(layer, linear))

    def read_folds(self, layer: int, linear: str, shares: Sequence[float | int] | None = None) -> Moments:
        """Returns the moments of one linear over some folds of the text, not shrunk, float32 on the CPU.

        Args:
            layer: Index of the layer.
            linear: `q_proj`, `down_proj`, ...
            shares: Weight of each fold, in any unit; 0 leaves a fold out. None: the folds' numbers of tokens.
        """
        with safe_open(self._path(layer), framework="pt") as file:
            metadata = file.metadata()
            shared, tokens = json.loads(metadata["shared"]), json.loads(metadata.get("tokens", "[]"))
            weights = tuple(tokens if shares is None else shares)
            assert shares is None or len(shares) == max(1, len(tokens)), (shares, tokens)

            def mean(name: str) -> Tensor:
                if not tokens:
                    return file.get_tensor(name)
                stored = file.get_slice(name)
                parts = [stored[fold] * (weight / sum(weights)) for fold, weight in enumerate(weights) if weight]
                return torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0]

            has_outputs = f"outputs.{linear}" in file.keys()  # noqa: SIM118
            return Moments(mean(f"inputs.{shared[linear]}"), mean(f"outputs.{linear}") if has_outputs else None)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Number of tokens of each fold; empty if the moments are not stored by folds."""
        with safe_open(self._path(0), framework="pt") as file:
            return tuple(json.loads(file.metadata().get("tokens", "[]")))

    def sign(self, source: dict[str, Any], tokens: int, text: str) -> None:
        """Records the source and the text of the moments, so that they can be used again; written last.

        Args:
            source: The source's fingerprint.
            tokens: Number of tokens.
            text: Name of the text.
        """
        write_json(self.folder / SIGNATURE_NAME, {"source": source, "tokens": tokens, "text": text})

    def check(self, source: dict[str, Any], with_gradients: bool, with_folds: bool = False) -> None:
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
        if with_folds and len(self.tokens) < 2:
            raise SourceError(
                f"{self.folder}: moments of two folds of the text are required for `calibration.shrink: auto` (got "
                f"one); give --calibration FILE instead, or a strength such as calibration.shrink=0.1"
            )

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:04d}.safetensors"


class MomentSums:
    """Sums of x x^T over tokens for the linears of one layer; linears with the same input share a sum.

    Args:
        folds: Fold of each sequence, from 0; None: one fold. All sequences must be seen in order, some at a time.
    """

    def __init__(self, folds: Int[Tensor, " B"] | None = None) -> None:
        self.shared: dict[str, str] = {}
        self._folds = folds
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._seen: dict[tuple[str, bool], int] = {}
        self._last: tuple[str, Tensor] | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Sums of inputs: `[in, in]`, or `[F, in, in]` with folds."""
        return self._inputs

    @property
    def outputs(self) -> dict[str, Tensor]:
        """Sums of gradients, likewise."""
        return self._outputs

    def see_input(self, layer: int, linear: str, x: Tensor) -> None:
        # Linears that share an input are called one after the other with the same tensor object.
        if self._last is not None and self._last[1] is x:
            self.shared[linear] = self._last[0]
            return
        self._last = (linear, x)
        self.shared[linear] = linear
        self._add(self._inputs, linear, x)

    def see_gradient(self, layer: int, linear: str, g: Tensor) -> None:
        self._add(self._outputs, linear, g)

    def store(self, store: MomentStore, layer: int, tokens: int) -> None:
        """Divides the sums by the number of tokens and stores them."""
        self.divide(tokens)
        store.write(layer, self._inputs, self.shared, self._outputs or None, self._split(tokens))

    def divide(self, tokens: int) -> None:
        """Divides the sums by the number of tokens, of each fold by its own."""
        split = self._split(tokens)
        for each in (self._inputs, self._outputs):
            for value in each.values():
                value.div_(torch.tensor(split, device=value.device)[:, None, None] if split else tokens)

    def _split(self, tokens: int) -> list[int]:
        """Returns the number of tokens of each fold; empty without folds."""
        if self._folds is None:
            return []
        return [tokens * int(rows) // len(self._folds) for rows in self._folds.bincount()]

    def _add(self, sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
        if self._folds is None:
            _add(sums, name, rows.detach().flatten(0, -2).float())
            return
        key = name, sums is self._outputs
        first = self._seen.get(key, 0)
        self._seen[key] = first + len(rows)
        folds = self._folds[first : first + len(rows)]
        if name not in sums:
            width = rows.shape[-1]
            sums[name] = torch.zeros(int(self._folds.max()) + 1, width, width, device=rows.device)
        for fold in folds.unique().tolist():
            flat = rows.detach()[folds == fold].flatten(0, -2).float()
            sums[name][fold].addmm_(flat.T, flat)


def _add(sums: dict[str, Tensor], name: str, flat: Float[Tensor, "M n"]) -> None:
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
        store: Store of the moments, by its `folds`.
        scratch: An existing folder for residual streams, which are deleted again.
        with_gradients: Whether gradients are measured too.
        seed: Seed of the labels.
        progress: Called with the number of layers that have run, forwards or backwards.
    """
    tokens, num_layers = sequences.input_ids.numel(), layers.arch.num_layers
    if not with_gradients:
        hidden = layers.embed(sequences.input_ids)
        for index in range(num_layers):
            layer, sums = layers.load(index), MomentSums(store.folds)
            hidden = layer.run(hidden, sequences.position_ids, sums.see_input)
            sums.store(store, index, tokens)
            del layer, sums
            progress(index + 1)
        return
    hidden = keep_streams(layers, sequences, scratch, progress)
    gradient = loss_gradient(layers, hidden, seed)
    for done, index in enumerate(range(num_layers - 1, -1, -1), start=num_layers + 1):
        layer, sums = layers.load(index), MomentSums(store.folds)
        hidden = take_stream(scratch, index)
        gradient = layer.run_back(hidden, sequences.position_ids, gradient, sums.see_input, sums.see_gradient)
        sums.store(store, index, tokens)
        del layer, sums  # Before the next layer is loaded: of a 7B model the two hold three gigabytes.
        progress(done)


def keep_streams(
    layers: SourceLayers, sequences: PackedSequence, scratch: Path, progress: Callable[[int], None]
) -> Float[Tensor, "B T D"]:
    """Runs text forward, keeps the residual stream before each layer on disk, and returns the last stream.

    Args:
        layers: Layers of the source.
        sequences: Packed tokens.
        scratch: An existing folder for the streams, from which `take_stream` reads.
        progress: Called with the number of layers that have run.
    """
    hidden = layers.embed(sequences.input_ids)
    for index in range(layers.arch.num_layers):
        save_file({"stream": hidden.contiguous()}, _stream(scratch, index))
        hidden = layers.load(index).run(hidden, sequences.position_ids)
        progress(index + 1)
    return hidden


def take_stream(scratch: Path, layer: int) -> Float[Tensor, "B T D"]:
    """Returns the residual stream before a layer, and deletes its file."""
    with safe_open(_stream(scratch, layer), framework="pt") as file:
        hidden = file.get_tensor("stream")
    _stream(scratch, layer).unlink()
    return hidden


def _stream(scratch: Path, layer: int) -> Path:
    return scratch / f"stream-{layer:04d}.safetensors"


def loss_gradient(layers: SourceLayers, hidden: Float[Tensor, "B T D"], seed: int) -> Float[Tensor, "B T D"]:
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
