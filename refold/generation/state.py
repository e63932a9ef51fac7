"""Prompt states: caches of prompts that are read once, in memory and on disk."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from refold.checkpoint import atomic_file
from refold.checkpoint.headers import parse_header, read_header_bytes
from refold.errors import RefoldError, SourceError
from refold.generation.kept_layers import KeptLayers, join, kept_names, take
from refold.modeling.cache_name import CACHE_NAME
from refold.modeling.recurrent_cache import new_cache
from refold.version import __version__

_SAMPLED = 64
_WORD_BYTES = 8
# Fields of a config that do not change the model's function.
_NEUTRAL_FIELDS = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
    "auto_map",
)


@torch.no_grad()
def fingerprint(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """Returns 64 hex digits that differ between models with different weights, dtypes or configs.

    Every weight is read once, so swapped adapters and further training change the digits. The same weights give the
    same digits on every device.

    Args:
        model: A loaded model, folded or not.
        dtype: Dtype to read the weights in. In a wide one, a model has the same digits as stored and widened in memory.
            None: each weight's own.
    """
    settings = {name: value for name, value in model.config.to_diff_dict().items() if name not in _NEUTRAL_FIELDS}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.named_parameters(), key=lambda each: each[0]):
        read = tensor if dtype is None else tensor.to(dtype)
        total, sample = _summarise(read)
        digest.update(f"{name} {read.dtype} {tuple(tensor.shape)} {total} {sample}\n".encode())
    return digest.hexdigest()


def _summarise(tensor: Tensor) -> tuple[int, list[int]]:
    """Returns the sum of all 8-byte words modulo 2^64, and a sample of words, so that their order counts too."""
    data = tensor.detach().contiguous()
    # A view into a larger tensor may not begin at a multiple of a word's size.
    data = (data.clone() if data.storage_offset() else data).view(-1).view(torch.uint8)
    whole = data.numel() // _WORD_BYTES * _WORD_BYTES
    words = data[:whole].view(torch.int64)
    sample = words[:: max(1, words.numel() // _SAMPLED)].tolist()
    return int(words.sum()), sample + data[whole:].tolist()


STATE_FORMAT = 1
_KEY = "refold_state"
_IDS = "token_ids"
_CHUNK = 2048
_WRITE_AGAIN = "write it again with --save-state"


@dataclass(frozen=True)
class PromptState:
    """State of a model after a prompt. It never changes, so it can be continued any number of times.

    Attributes:
        token_ids: Token ids of the prompt.
        kept: The cache after all tokens but the last one. The last token is run with the continuation, which may be
            empty.
        fingerprint: Fingerprint of the model that read the prompt.
        dtype: Dtype of that model's weights.
    """

    token_ids: tuple[int, ...]
    kept: KeptLayers
    fingerprint: str
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the cached tensors."""
        return sum(tensor.nbytes for layer in self.kept.layers for tensor in layer.values())

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Writes the state to one safetensors file, atomically.

        Args:
            path: The file.
            overwrite: Replace an older state file; other files are never replaced.

        Raises:
            RefoldError: The file exists.
            FolderError: The file cannot be written.
        """
        path = require_free(path, overwrite)
        tensors = {_IDS: torch.tensor(self.token_ids, dtype=torch.int32)}
        for index, layer in enumerate(self.kept.layers):
            tensors |= {f"layers.{index}.{name}": tensor.contiguous() for name, tensor in layer.items()}
        metadata = {
            "format": STATE_FORMAT,
            "refold": __version__,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "tokens_seen": self.kept.tokens_seen,
        }
        atomic_file.write_file(path, lambda unfinished: _write(unfinished, tensors, metadata))

    def require_model(self, model: PreTrainedModel, where: str = "state") -> None:
        """Checks that a model is the one that read the prompt.

        Raises:
            RefoldError: The model is another one, has changed since, or is loaded in another dtype.
        """
        dtype = _dtype_name(model)
        if dtype != self.dtype:
            raise RefoldError(
                f"{where}: a state in {dtype}, as the model is, is required (got {self.dtype}); load the model with "
                f"dtype {self.dtype}, or {_WRITE_AGAIN}"
            )
        if fingerprint(model) != self.fingerprint:
            raise RefoldError(
                f"{where}: a state of this model is required (got that of another, or of this one before its weights "
                f"changed); give the model that read the prompt, or {_WRITE_AGAIN}"
            )

    def open(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> DynamicCache | None:
        """Makes a cache that has read several prompts except for their last tokens.

        Args:
            model: The model that read this state.
            prompts: Token ids; each prompt begins with this state's. The attention mask must pad them on the left.

        Returns:
            The cache; None if the state's prompt has one token, so that nothing is cached.
        """
        if not self.kept.tokens_seen:
            return None
        if len(prompts) == 1:
            return self._read_on(model, prompts[0])
        rows = [take(self._read_on(model, prompt), len(prompt) - 1) for prompt in prompts]
        return join(model.config, rows)

    def _read_on(self, model: PreTrainedModel, prompt: Sequence[int]) -> DynamicCache:
        cache = join(model.config, [self.kept])
        _feed(model, cache, prompt[self.kept.tokens_seen : -1])
        return cache


def read_state(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    state: PromptState | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PromptState:
    """Reads a prompt in pieces, so that the memory for activations does not grow with its length.

    Args:
        model: A model, folded or not.
        token_ids: Token ids, at least one.
        state: State of the prompt's beginning, read before.
        on_progress: Called with the number of tokens read and of all tokens.

    Raises:
        RefoldError: The model caches other tensors than keys, values and states, or the state is not this model's.
    """
    kept_names(model.config)
    seen = 0
    if state is None or not state.kept.tokens_seen:
        cache = new_cache(model.config)
    else:
        cache, seen = join(model.config, [state.kept]), state.kept.tokens_seen
    _feed(model, cache, token_ids[seen:-1], on_progress)
    return PromptState(
        token_ids=tuple(token_ids),
        kept=take(cache, len(token_ids) - 1),
        fingerprint=fingerprint(model) if state is None else state.fingerprint,
        dtype=_dtype_name(model),
    )


def load_state(path: str | Path, model: PreTrainedModel) -> PromptState:
    """Reads a state file onto the model's device.

    Args:
        path: The file.
        model: The model that read the prompt.

    Raises:
        RefoldError: The file is missing, damaged, of another format, or of another model.
    """
    path = Path(path)
    metadata, names = _read_header(path)
    state = PromptState((), KeptLayers(metadata["tokens_seen"], ()), metadata["fingerprint"], metadata["dtype"])
    state.require_model(model, str(path))
    wanted = {_IDS}
    for index, layer in enumerate(kept_names(model.config)):
        wanted |= {f"layers.{index}.{name}" for name in layer if metadata["tokens_seen"]}
    if names != wanted:
        first = sorted(names ^ wanted)[0]
        raise RefoldError(f"{path}: the tensors of this model's layers are required (see {first}); {_WRITE_AGAIN}")
    tensors = load_file(path, device=str(model.device))
    token_ids = tuple(tensors.pop(_IDS).tolist())
    layers: list[dict[str, Tensor]] = [{} for _ in kept_names(model.config)]
    for name, tensor in tensors.items():
        _, index, part = name.split(".")
        layers[int(index)][part] = tensor
    return PromptState(token_ids, KeptLayers(metadata["tokens_seen"], tuple(layers)), state.fingerprint, state.dtype)


def require_free(path: str | Path, overwrite: bool = False) -> Path:
    """Checks that a state can be written to a file.

    Args:
        path: The file.
        overwrite: An older state file may be replaced.

    Raises:
        RefoldError: A file exists that must not be replaced.
    """
    return atomic_file.require_free(path, "state file", _is_state, overwrite)


def _is_state(path: Path) -> bool:
    try:
        _read_header(path)
    except RefoldError:
        return False
    return True


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    # `save_file` gives read rights to the owner only; the mode of a usual new file is restored.
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, {_KEY: json.dumps(metadata)})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)


def _read_header(path: Path) -> tuple[dict[str, Any], set[str]]:
    """Reads the metadata of a state file and the names of its tensors."""
    if not path.exists():
        raise RefoldError(f"{path}: a state file is required (no such file); write one with --save-state")
    try:
        raw, num_bytes = read_header_bytes(path)
        names = set(parse_header(raw, path.name, num_bytes, where=str(path)))
        metadata = json.loads(json.loads(raw)["__metadata__"][_KEY])
    except SourceError as error:
        reason = str(error).removeprefix(f"{path}: ").rpartition(";")[0]
        raise RefoldError(f"{path}: a whole state file is required ({reason}); {_WRITE_AGAIN}") from None
    except (KeyError, TypeError, ValueError):
        raise RefoldError(
            f"{path}: a state file is required (got safetensors of another kind); write one with --save-state"
        ) from None
    if not isinstance(metadata, dict) or metadata.get("format") != STATE_FORMAT:
        got = metadata.get("format") if isinstance(metadata, dict) else metadata
        raise RefoldError(
            f"{path}: state format {STATE_FORMAT} is required (got {got}); use the refold that wrote it, or "
            f"{_WRITE_AGAIN}"
        )
    kinds = {"fingerprint": str, "dtype": str, "tokens_seen": int}
    if not all(isinstance(metadata.get(name), kind) for name, kind in kinds.items()):
        raise RefoldError(f"{path}: {', '.join(kinds)} are required in its header; {_WRITE_AGAIN}")
    return metadata, names


@torch.no_grad()
def _feed(
    model: PreTrainedModel,
    cache: DynamicCache,
    token_ids: Sequence[int],
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    # The base model runs without the head, because no logits are needed.
    stack: Any = model.base_model
    for begin in range(0, len(token_ids), _CHUNK):
        piece = torch.tensor([token_ids[begin : begin + _CHUNK]], device=model.device)
        stack(input_ids=piece, use_cache=True, **{CACHE_NAME: cache})
        if on_progress is not None:
            on_progress(begin + piece.shape[1], len(token_ids))


def _dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")
