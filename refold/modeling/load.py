"""Models and tokenizers from a folder or hub id: folded ones and sources alike."""

import contextlib
import functools
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from refold.checkpoint.companions import check_companions, offers_tokenizer
from refold.checkpoint.expected_tensors import expect_tensors
from refold.checkpoint.finite import require_finite
from refold.checkpoint.folded_tensors import check_folded_tensors, float_names, read_blueprint
from refold.checkpoint.folder import settle
from refold.checkpoint.headers import INDEX_NAME
from refold.checkpoint.headers import stored_dtype as read_stored_dtype
from refold.checkpoint.locate import Source, locate
from refold.checkpoint.reader import CheckpointReader
from refold.checkpoint.source_file import parse_object, read_file
from refold.errors import RefoldError, SourceError
from refold.modeling.configuration import MODEL_TYPE, RefoldConfig
from refold.modeling.model import RefoldForCausalLM
from refold.modeling.registration import register
from refold.recipe.recipe import IgnoredTensor
from refold.suggest import must_be_one_of

DTYPES = ("float32", "bfloat16", "float16")
ModelLike = str | Path | Source | PreTrainedModel
"""A folder, a hub id, a located source, or a loaded model."""

logger = logging.getLogger("refold")


def choose_device(name: str | None = None) -> torch.device:
    """Returns the named device; without a name cuda, else mps, else cpu.

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
    if device.type == "meta":
        raise RefoldError("device: one that computes is required (got 'meta'); give cpu, cuda or mps")
    return device


def choose_dtype(name: str | torch.dtype | None = None) -> torch.dtype | str:
    """Returns the named dtype; without a name `auto`, which selects the dtype of the stored weights.

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
    """Locates a model, fetches it from the hub if need be, and checks its files and tensors against its config.

    Raises:
        SourceError: Missing, unreachable or of an unknown family; or tensors are missing, misshapen or without a place.
        FolderError: A folder refold wrote is torn, or its weights are not those of its blueprint.
    """
    located, folder, _ = _open(source)
    return located, folder


def _open(source: str | Path | Source) -> tuple[Source, Path, str]:
    """Opens a model like `open_source`, and returns the stored dtype as well."""
    located = source if isinstance(source, Source) else locate(source)
    folder = settle(located.fetch())
    return located, folder, _check(folder, located.ignore_tensors)


def _check(folder: Path, ignore_tensors: Sequence[tuple[str, str]]) -> str:
    """Checks a model's tensors against its config, and its companion files; returns the stored dtype."""
    here = locate(folder)
    config = here.read_config()
    is_folded = config.get("model_type") == MODEL_TYPE
    expected = None if is_folded else expect_tensors(here, config)
    headers = here.headers()
    assert headers is not None
    check_companions(here.fetch_companions())
    if expected is None:
        blueprint = read_blueprint(here.where, config)
        check_folded_tensors(here.where, blueprint, headers)
        return read_stored_dtype(here.where, headers, float_names(blueprint, headers))
    expected.check([IgnoredTensor(name=name, reason=reason) for name, reason in ignore_tensors])
    return read_stored_dtype(here.where, headers, expected.tensors)


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
        dtype: Dtype of the weights; `auto`: the dtype of most stored numbers, whatever the config says; None: that
            dtype if it computes fast, else float32, which holds the same numbers; `stored_dtype` then returns the
            dtype of the stored weights.
        device: Where to put it; None: `choose_device()`.
        attn_implementation: transformers' name of an attention back-end; None: its choice.

    Raises:
        SourceError: Missing, broken, of an unknown family, too large for memory, or a weight is not finite.
        FolderError: Torn, or weights that are not those of its blueprint.
        RefoldError: No such dtype or device.
    """
    register()
    target = device if isinstance(device, torch.device) else choose_device(device)
    wanted = choose_dtype(dtype)
    _, folder, stored = _open(source)
    if wanted == "auto":
        wanted = getattr(torch, stored)
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _explained(folder):
        with _without_bars():
            model = (_from_folder if folder.is_dir() else _from_reader)(folder, wanted, options)
        model.config._name_or_path = model.name_or_path = str(folder)
        for name, weight in model.named_parameters():
            require_finite(weight, name, str(folder), SourceError, "take an undamaged copy of the checkpoint")
        return _place(model, dtype, target)


def _from_folder(folder: Path, dtype: Any, options: dict[str, Any]) -> Any:
    with _loadable(folder) as path:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False, **options
        )


def _from_reader(path: Path, dtype: Any, options: dict[str, Any]) -> Any:
    """Makes a model of transformers from tensors that transformers does not read itself."""
    source = locate(path)
    companions = source.fetch_companions()
    config = AutoConfig.from_pretrained(companions, local_files_only=True, trust_remote_code=False)
    with CheckpointReader(path) as reader:
        names = expect_tensors(source, source.read_config()).tensors
        tensors = {name: reader.read(name, dtype) for name in names}
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    made = model.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **options)
    made.generation_config = GenerationConfig.from_pretrained(companions, local_files_only=True)
    return made


def load_tensors(
    config: RefoldConfig,
    tensors: dict[str, Tensor],
    folder: Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> RefoldForCausalLM:
    """Makes a folded model of tensors in memory, which are not copied where dtype and device stay the same.

    Args:
        config: Config of the model; its `dtype` is that of the tensors.
        tensors: Its tensors by name.
        folder: The folder they come from.
        dtype: As for `load_model`.
        device: As for `load_model`.

    Raises:
        SourceError: There is not enough memory.
        FolderError: The tensors are not those of the blueprint.
        RefoldError: No such dtype or device.
    """
    register()
    target = device if isinstance(device, torch.device) else choose_device(device)
    wanted = choose_dtype(dtype)
    with _explained(folder), _without_bars():
        model: Any = RefoldForCausalLM.from_pretrained(
            None, config=config, state_dict=tensors, dtype=config.dtype if wanted == "auto" else wanted
        )
        model.config._name_or_path = model.name_or_path = str(folder)
        companions = locate(folder).fetch_companions()
        if (companions / GENERATION_CONFIG_NAME).exists():
            model.generation_config = GenerationConfig.from_pretrained(companions, local_files_only=True)
        return _place(model, dtype, target)


def _place(model: Any, dtype: str | torch.dtype | None, target: torch.device) -> Any:
    """Moves a loaded model to its device, in a dtype that computes fast if none was named."""
    if dtype is None and not computes_fast(model.dtype, target):
        _tell_replaced(model.dtype)
        model.stored_dtype = model.dtype
        model = model.float()
    model = model.to(target).eval()
    if isinstance(model, RefoldForCausalLM):
        model.settle_integers()
    return model


@contextlib.contextmanager
def _explained(folder: Path, part: str = "") -> Iterator[None]:
    """Turns loaders' errors about the content of a folder, or about missing memory, into errors of one line."""
    try:
        yield
    except RefoldError:
        raise
    except Exception as error:
        # The loaders raise almost every type there is, tokenizers even `Exception` itself.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        if is_out_of_memory(error):
            raise SourceError(
                f"{folder}: enough memory for its weights is required ({reason}); free some, or choose a smaller "
                f"dtype or another device"
            ) from error
        raise SourceError(f"{folder}: {part}cannot be loaded ({reason})") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether an error tells that memory ran out; PyTorch's CPU allocator has no type of its own for that."""
    words = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(each in str(error) for each in words)


@contextlib.contextmanager
def _loadable(folder: Path) -> Iterator[Path]:
    """Yields a folder that transformers can load: links to the files if the index has no `metadata`, else itself."""
    if not (folder / INDEX_NAME).exists():
        yield folder
        return
    index = parse_object(read_file(folder / INDEX_NAME), str(folder / INDEX_NAME), "download it again")
    if isinstance(index.get("metadata"), dict):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="refold-index-") as name:
        linked = Path(name)
        for path in folder.iterdir():
            if path.name != INDEX_NAME:
                (linked / path.name).symlink_to(path.resolve())
        (linked / INDEX_NAME).write_text(json.dumps({**index, "metadata": {}}), encoding="utf-8")
        yield linked


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """Returns the dtype a model's weights are stored in, where `load_model` widened them; else the model's own."""
    return getattr(model, "stored_dtype", model.dtype)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Switches off transformers' progress bars, which it draws for short loads and without a terminal too."""
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
    path = settle(located.fetch())
    folder = located.fetch_companions()
    if not offers_tokenizer(folder):
        raise SourceError(f"{path}: a tokenizer is required (none there); copy the tokenizer's files into it")
    check_companions(folder)
    with _explained(path, "its tokenizer "):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
