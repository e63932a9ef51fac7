"""Models for the engine: folded ones as they are, sources as a stack in which every layer is kept."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from refold.blueprint.quantisation import holds_integers
from refold.checkpoint.locate import locate
from refold.checkpoint.reader import CheckpointReader
from refold.conversion.convert import make_config
from refold.conversion.target_tensors import TargetBuilder
from refold.engine.settings import EngineSettings
from refold.errors import RefoldError
from refold.modeling.configuration import MODEL_TYPE
from refold.modeling.load import ModelLike, load_model, load_tensors, open_source
from refold.modeling.model import RefoldForCausalLM
from refold.modeling.packed_weights import PackedBytes, PackSettings, pack_model
from refold.nn.products import FLOATS
from refold.planning.plan import plan_model
from refold.recipe.load import load_recipe
from refold.sources.pieces import PieceReader
from refold.sources.source_model import read_source_model


def open_model(
    model: ModelLike, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None
) -> RefoldForCausalLM:
    """Opens a folded model, or a source, which becomes in memory the folded model of the empty recipe.

    Args:
        model: Folder or hub id of a folded model or a source, or a loaded folded model.
        dtype: As for `load_model`; None for a loaded model.
        device: As for `load_model`; None for a loaded model.

    Raises:
        SourceError: The model is missing, broken, of an unknown family or too large for memory.
        FolderError: The folder is torn.
        RefoldError: There is no such dtype or device; the loaded model is no folded one, or is given with a dtype or
            device.
    """
    if not isinstance(model, PreTrainedModel):
        located, folder = open_source(model)
        if located.read_config().get("model_type") != MODEL_TYPE:
            return _open_source(folder, located.ignore_tensors, dtype, device)
        loaded = load_model(located, dtype=dtype, device=device)
        assert isinstance(loaded, RefoldForCausalLM)
        return loaded
    if not isinstance(model, RefoldForCausalLM):
        raise RefoldError(
            f"model: a folder, a hub id or a folded model is required (got a loaded {type(model).__name__}); write it "
            f"with save_pretrained, and give the folder"
        )
    for name, value in (("dtype", dtype), ("device", device)):
        if value is not None:
            raise RefoldError(
                f"{name}: only a model loaded from a folder can be given one (got {value} for a loaded model); call "
                f"model.to(...) before"
            )
    return model


def pack(
    opened: RefoldForCausalLM, settings: EngineSettings, is_own: bool
) -> tuple[RefoldForCausalLM, PackedBytes | None]:
    """Packs the weights of a model in the form that decoding is fastest with.

    Args:
        opened: From `open_model`, in the dtype it is stored in.
        settings: Of the engine.
        is_own: Whether the model was loaded for the engine. Another one stays as it is: with `weights: auto` it is
            used, else copied.

    Returns:
        The model; and the bytes of its weights, None for a model that is used as it is.

    Raises:
        RefoldError: The model is packed already, or its device has no products of such weights.
    """
    wanted = settings.weights
    if not is_own and wanted == "auto":
        return opened, None
    if opened.is_packed:
        raise RefoldError(f"weights: a model that is not packed is required for {wanted!r}; give its folder")
    if not is_own:
        opened = copy.deepcopy(opened)
    are_floats_wanted = wanted in FLOATS
    if wanted == "auto":
        # Half precision of the other kind has no packed products of its own. Kernels of integers read bfloat16.
        has_integers = holds_integers(opened.config.read_blueprint())
        wanted = "float32" if opened.dtype == torch.float32 and not has_integers else "bfloat16"
    # The head decides on the token, so it never gets fewer than 8 bits.
    head = "int8" if wanted in ("int8", "int4") else None
    formats = PackSettings(wanted, head, keep_dense=settings.keep_dense, keep_integers=not are_floats_wanted)
    return opened, pack_model(opened, formats)


def _open_source(
    folder: Path,
    ignore_tensors: Sequence[tuple[str, str]],
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
) -> RefoldForCausalLM:
    """Opens a source. A tensor in its stored dtype stays a view of the file, so it takes no memory of its own."""
    ignored = [{"name": name, "reason": reason} for name, reason in ignore_tensors]
    source = locate(folder)
    model = read_source_model(source)
    plan = plan_model(model, load_recipe({"ignore_tensors": ignored}), allow_larger=True).settle()
    config = make_config(plan, source)
    with CheckpointReader(folder) as reader:
        builder = TargetBuilder(plan, PieceReader(model, reader), getattr(torch, plan.dtype))
        return load_tensors(config, dict(builder.build()), folder, dtype=dtype, device=device)
