"""Prompt states on disk: caches of prompts that are read once."""

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
# What a config says of where the model came from and how it is run, not of what it computes.
_PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "auto_map")


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Returns 64 hex digits that differ between models with other weights, dtypes or configs.

    Every weight is read once: adapters that were swapped, or weights that were trained on, make another model. The same
    weights give the same digits on every device.

    Args:
        model: Loaded, folded or not.
    """
    settings = {name: value for name, value in model.config.to_diff_dict().items() if name not in _PASSING}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.named_parameters(), key=lambda each: each[0]):
        total, sample = _summarise(tensor)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {total} {sample}\n".encode())
    return digest.hexdigest()


def _summarise(tensor: Tensor) -> tuple[int, list[int]]:
    """The sum of all bytes, eight at a time and modulo 2^64, and some of them, so that their order counts as well."""
    data = tensor.detach().contiguous()
    # Words must begin where words do, which a view into a larger tensor need not.
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
    """What a model remembers after a prompt. It is never changed, so that it can be continued any number of times.

    Attributes:
        token_ids: Of the prompt.
        kept: Of all its tokens but the last, which is read with what follows: so the next token is known even where
            nothing follows.
        fingerprint: Of the model that read it.
        dtype: Of that model's weights.
    """

    token_ids: tuple[int, ...]
    kept: KeptLayers
    fingerprint: str
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of what the layers hold."""
        return sum(tensor.nbytes for layer in self.kept.layers for tensor in layer.values())

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Writes it to one safetensors file, which is there whole afterwards or not at all.

        Args:
            path: The file.
            overwrite: Replace an older state file; a file of anything else is refused all the same.

        Raises:
            RefoldError: The file exists.
            FolderError: It cannot be written.
        """
        path = require_free(path, overwrite)
        tensors = {_IDS: torch.tensor(self.token_ids, dtype=torch.int32)}
        for index, layer in enumerate(self.kept.layers):
            tensors |= {f"layers.{index}.{name}": tensor.contiguous() for name, tensor in layer.items()}
        said = {
            "format": STATE_FORMAT,
            "refold": __version__,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "tokens_seen": self.kept.tokens_seen,
        }
        atomic_file.write_file(path, lambda unfinished: _write(unfinished, tensors, said))

    def require_model(self, model: PreTrainedModel, where: str = "state") -> None:
        """Checks that a model is the one that read the prompt.

        Raises:
            RefoldError: It is another, has changed since, or was loaded in another dtype.
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
        """Makes a cache that has read all of some prompts but their last tokens.

        Args:
            model: The one that read this state.
            prompts: Token ids; each begins with this state's. The mask that goes with the cache pads them on the left.

        Returns:
            The cache; None where there is nothing to be kept of a prompt of one token.
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
    """Reads a prompt, in pieces, so that memory does not grow with what the model does not keep.

    Args:
        model: Folded or not.
        token_ids: At least one.
        state: Of how the prompt begins, read before.
        on_progress: Told (tokens read, tokens in all).

    Raises:
        RefoldError: The model caches something else than keys, values and states, or the state is not this model's.
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
    """Reads a state file, onto the model's device.

    Args:
        path: The file.
        model: The one that read the prompt.

    Raises:
        RefoldError: There is no such file, it is damaged, of another format, or of another model.
    """
    path = Path(path)
    said, names = _read_header(path)
    state = PromptState((), KeptLayers(said["tokens_seen"], ()), said["fingerprint"], said["dtype"])
    state.require_model(model, str(path))
    wanted = {_IDS}
    for index, layer in enumerate(kept_names(model.config)):
        wanted |= {f"layers.{index}.{name}" for name in layer if said["tokens_seen"]}
    if names != wanted:
        first = sorted(names ^ wanted)[0]
        raise RefoldError(f"{path}: the tensors of this model's layers are required (see {first}); {_WRITE_AGAIN}")
    tensors = load_file(path, device=str(model.device))
    token_ids = tuple(tensors.pop(_IDS).tolist())
    layers: list[dict[str, Tensor]] = [{} for _ in kept_names(model.config)]
    for name, tensor in tensors.items():
        _, index, part = name.split(".")
        layers[int(index)][part] = tensor
    return PromptState(token_ids, KeptLayers(said["tokens_seen"], tuple(layers)), state.fingerprint, state.dtype)


def require_free(path: str | Path, overwrite: bool = False) -> Path:
    """Checks that a state can be written to a file.

    Args:
        path: The file.
        overwrite: An older state file may be there.

    Raises:
        RefoldError: Something is there.
    """
    return atomic_file.require_free(path, "state file", _is_state, overwrite)


def _is_state(path: Path) -> bool:
    try:
        _read_header(path)
    except RefoldError:
        return False
    return True


def _write(path: Path, tensors: dict[str, Tensor], said: dict[str, Any]) -> None:
    # The library writes for the owner alone; others may read as much as of any new file.
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, {_KEY: json.dumps(said)})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)


def _read_header(path: Path) -> tuple[dict[str, Any], set[str]]:
    """What a state file says of itself, and the names of its tensors."""
    if not path.exists():
        raise RefoldError(f"{path}: a state file is required (no such file); write one with --save-state")
    try:
        raw, num_bytes = read_header_bytes(path)
        names = set(parse_header(raw, path.name, num_bytes, where=str(path)))
        said = json.loads(json.loads(raw)["__metadata__"][_KEY])
    except SourceError as error:
        reason = str(error).removeprefix(f"{path}: ").rpartition(";")[0]
        raise RefoldError(f"{path}: a whole state file is required ({reason}); {_WRITE_AGAIN}") from None
    except (KeyError, TypeError, ValueError):
        raise RefoldError(
            f"{path}: a state file is required (got safetensors of another kind); write one with --save-state"
        ) from None
    if not isinstance(said, dict) or said.get("format") != STATE_FORMAT:
        got = said.get("format") if isinstance(said, dict) else said
        raise RefoldError(
            f"{path}: state format {STATE_FORMAT} is required (got {got}); use the refold that wrote it, or "
            f"{_WRITE_AGAIN}"
        )
    kinds = {"fingerprint": str, "dtype": str, "tokens_seen": int}
    if not all(isinstance(said.get(name), kind) for name, kind in kinds.items()):
        raise RefoldError(f"{path}: {', '.join(kinds)} are required in its header; {_WRITE_AGAIN}")
    return said, names


@torch.no_grad()
def _feed(
    model: PreTrainedModel,
    cache: DynamicCache,
    token_ids: Sequence[int],
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    # Without the head: no logits are wanted.
    stack: Any = model.base_model
    for begin in range(0, len(token_ids), _CHUNK):
        piece = torch.tensor([token_ids[begin : begin + _CHUNK]], device=model.device)
        stack(input_ids=piece, use_cache=True, **{CACHE_NAME: cache})
        if on_progress is not None:
            on_progress(begin + piece.shape[1], len(token_ids))


def _dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")
