"""Models and tokenizers from a folder or hub id: folded ones and sources alike."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from refold.checkpoint.companions import has_tokenizer
from refold.checkpoint.folder import settle
from refold.checkpoint.locate import Source, locate
from refold.errors import RefoldError, SourceError
from refold.families.registry import find_family
from refold.modeling.configuration import MODEL_TYPE
from refold.modeling.registration import register
from refold.suggest import must_be_one_of

DTYPES = ("float32", "bfloat16", "float16")
ModelLike = str | Path | Source | PreTrainedModel
"""A folder, a hub id, a located source, or a loaded model."""

logger = logging.getLogger("refold")


def choose_device(name: str | None = None) -> torch.device:
    """Returns the device asked for; without a wish cuda, else mps, else cpu.

    Raises:
        RefoldError: No such device here.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise RefoldError(f"device: one of this machine's devices is required (got '{name}': {reason})") from None
    return device


def choose_dtype(name: str | torch.dtype | None = None) -> torch.dtype | str:
    """Returns the dtype asked for; without a wish, and for `auto`, the one the weights are stored in.

    Raises:
        RefoldError: Not one of float32, bfloat16, float16.
    """
    if name is None or name == "auto":
        return "auto"
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise RefoldError(f"dtype: {must_be_one_of(name, DTYPES)}")
    return getattr(torch, name)


def computes_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Says whether matrix products of a dtype are at least about as fast as float32's.

    On CPUs without instructions for it (AVX-512 for bfloat16, AVX-512-FP16 or AMX for float16, on x86) half precision
    falls to a loop that takes 10 to 50 times as long as float32.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    return _has_half_instructions(dtype)


@functools.cache
def _has_half_instructions(dtype: torch.dtype) -> bool:
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    # Not public, and not there in builds without oneDNN, whose half precision is that loop.
    is_supported = getattr(torch.ops.mkldnn, name, None)
    return torch.backends.mkldnn.is_available() and is_supported is not None and bool(is_supported())


@functools.cache
def _tell_replaced(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    logger.warning(
        f"{name} is slow on this CPU: weights stored in it are computed with in float32 (dtype {name} forces it)"
    )


def open_source(source: str | Path | Source) -> tuple[Source, Path]:
    """Locates a model, fetches it where it is on the hub, and checks that it is whole and of a known family.

    Raises:
        SourceError: Missing, unreachable or of an unknown family.
        FolderError: A folder refold wrote is torn.
    """
    located = source if isinstance(source, Source) else locate(source)
    folder = settle(located.fetch())
    config = located.read_config()
    if config.get("model_type") != MODEL_TYPE:
        find_family(config.get("model_type"), config)
    located.headers()
    return located, folder


def load_model(
    source: str | Path | Source,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Loads a folded model, or a source, ready to evaluate. Code in a checkpoint is never run.

    Args:
        source: Folder, hub id, or a located source.
        dtype: Dtype of the weights; `auto`: as stored; None: as stored where that computes fast, else float32, which
            holds the same numbers; `stored_dtype` then says what they are stored in.
        device: Where to put it; None: `choose_device()`.
        attn_implementation: transformers' name of an attention back-end; None: its choice.

    Raises:
        SourceError: Missing, broken, or of an unknown family.
        FolderError: Torn, or weights that are not those of its blueprint.
    """
    register()
    _, folder = open_source(source)
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        with _without_bars():
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=choose_dtype(dtype),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                **options,
            )
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder}: cannot be loaded ({str(error).splitlines()[0][:160]})") from error
    target = device if isinstance(device, torch.device) else choose_device(device)
    if dtype is None and not computes_fast(model.dtype, target):
        _tell_replaced(model.dtype)
        model.stored_dtype = model.dtype
        model = model.float()
    return model.to(target).eval()


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """Returns the dtype a model's weights are stored in, where `load_model` widened them; else the model's own."""
    return getattr(model, "stored_dtype", model.dtype)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keeps transformers from drawing a bar for what takes a second, even where nobody looks."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_tokenizer(source: str | Path | Source) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder or hub id.

    Raises:
        SourceError: There is none, or it cannot be loaded.
    """
    register()
    located = source if isinstance(source, Source) else locate(source)
    folder = settle(located.fetch())
    if not has_tokenizer([path.name for path in folder.iterdir()]):
        raise SourceError(f"{folder}: a tokenizer is required (none there); copy the tokenizer's files into it")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{folder}: its tokenizer cannot be loaded ({str(error).splitlines()[0][:160]})") from error
