"""Packing: a folded model whose weights are prepared for inference, in floats or integers."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from refold.errors import RefoldError
from refold.modeling.depth import Depth
from refold.modeling.load import computes_fast
from refold.modeling.model import RefoldForCausalLM
from refold.nn.lora import Coefficients, LoraPairs
from refold.nn.norms import StackNorm
from refold.nn.part import StoredPart
from refold.nn.products import FLOATS, FORMATS, INTEGERS, IntegerProduct, Product
from refold.nn.quantised import IntegerWeight, QuantisedEmbedding
from refold.nn.weights import weight_of
from refold.nn.workshop import Workshop
from refold.suggest import must_be_one_of

logger = logging.getLogger("refold")


@dataclass(frozen=True)
class PackSettings:
    """The numbers in which weights are held for inference.

    Attributes:
        weights: Of the linears of stored parts. Activations, norms and embedding are in this dtype, or beside integers
            in bfloat16 (in float32 on a CPU where bfloat16 is slow).
        head: Of the head; None: the dtype of activations.
        adapters: Of LoRA factors; None: int8 beside integers, else the dtype of activations. A small product of int8
            begins three times as fast as one of bfloat16.
        keep_dense: Whether a second copy of a weight may be held: in floats beside integers, for the numbers of rows at
            which a measurement finds them faster; of a head tied to the embedding, in the layout that is fastest.
        keep_integers: Whether weights that are stored as integers are held as they are, whatever `weights`, `head` and
            `adapters` say; else they become floats first.
        dtype: Of activations; set by packing.
    """

    weights: str = "float32"
    head: str | None = None
    adapters: str | None = None
    keep_dense: bool = False
    keep_integers: bool = True
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("weights", "head", "adapters"):
            given = getattr(self, name)
            if given is not None and given not in FORMATS:
                raise RefoldError(f"{name}: {must_be_one_of(given, FORMATS)}")


@dataclass(frozen=True)
class PackedBytes:
    """The bytes of a packed model.

    Attributes:
        stack: Of linears and adapters of stored parts and depths.
        head: Of the head, 0 where it is the embedding's memory.
        embedding: Of the embedding.
        others: Of norms, biases and other tensors.
        formats: The settings, with the formats that were taken in place of None and of slow dtypes.
    """

    stack: int
    head: int
    embedding: int
    others: int
    formats: PackSettings

    @property
    def total(self) -> int:
        """All of them."""
        return self.stack + self.head + self.embedding + self.others


class PackedHead(nn.Module):
    """The head of a packed model: no parameters, one product.

    Args:
        product: Of the head's weight.
    """

    def __init__(self, product: Product):
        super().__init__()
        self.product = product
        self.out_features, self.in_features = product.shape

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = self.product(hidden_states.reshape(-1, hidden_states.shape[-1]))
        return flat.view(*hidden_states.shape[:-1], flat.shape[-1])


@torch.no_grad()
def pack_model(model: PreTrainedModel, settings: PackSettings | None = None) -> PackedBytes:
    """Replaces the linears of a folded model by products that are prepared for inference; it cannot be undone.

    Weights are rounded as by `quantise_linears`. A packed model neither trains nor saves.

    Args:
        model: A folded model, changed in place.
        settings: Formats; None: float32.

    Raises:
        RefoldError: The model is no folded one, is packed already, or its device has no kernels for the format.
    """
    if not isinstance(model, RefoldForCausalLM):
        raise RefoldError(f"pack: a folded model is required (got {type(model).__name__}); convert it first")
    if model.is_packed:
        raise RefoldError("pack: a model that is not packed is required (it is packed); load it again")
    formats = _settle(settings or PackSettings(), model.device)
    stack = model.model
    workshop = Workshop(formats.dtype, model.device, formats.keep_dense, formats.keep_integers)
    model.eval().requires_grad_(False)
    model.hold_integers()
    # Weights of linears are rounded from the numbers they have; all other tensors take the dtype of activations.
    # Copies even in the same dtype: a view of a file would keep the whole file in memory.
    _convert(model, formats.dtype, lambda module: not isinstance(module, nn.Linear | LoraPairs | Coefficients), True)
    for part in (*stack.mixers, *stack.mlps):
        cast("StoredPart", part).pack(workshop, formats.weights)
    for depth in cast("list[Depth]", list(stack.depths)):
        depth.pack(stack.parts_of(depth), workshop, (formats.adapters or formats.weights, formats.weights))
    for module in stack.modules():
        if isinstance(module, StackNorm) and module.fused is None and module.weight is not None:
            module.fuse()
    stack_bytes = workshop.num_bytes
    is_tied = bool(model.config.tie_word_embeddings)
    head = weight_of(model.lm_head)
    product = workshop.make("lm_head", head, None, formats.head or formats.weights, shares=is_tied)
    embedding_bytes = sum(each.nbytes for each in stack.embed_tokens.parameters())
    if isinstance(stack.embed_tokens, QuantisedEmbedding):
        stack.embed_tokens.like = stack.embed_tokens.like.to(formats.dtype)
        if is_tied and isinstance(product, IntegerProduct) and stack.embed_tokens.share(product):
            embedding_bytes = 0
    else:
        embedding_bytes = cast("Tensor", stack.embed_tokens.weight).nbytes
    model.lm_head = cast("nn.Linear", PackedHead(product))
    _convert(model, formats.dtype, lambda module: True)
    for line in workshop.refused:
        logger.info(line)
    model.is_packed = stack.is_packed = True
    others = sum(each.nbytes for each in model.parameters()) - embedding_bytes
    return PackedBytes(stack_bytes, workshop.num_bytes - stack_bytes, embedding_bytes, others, formats)


@torch.no_grad()
def pack_adapters(model: RefoldForCausalLM, depths: Sequence[Depth], formats: PackSettings) -> int:
    """Packs the adapters of depths that run the parts of a packed model.

    Args:
        model: Packed.
        depths: The model's depths with other adapters, changed in place.
        formats: From `pack_model`.

    Returns:
        Bytes of the adapters.
    """
    workshop = Workshop(formats.dtype, model.device, formats.keep_dense, formats.keep_integers)
    others = 0
    for own, depth in zip(cast("list[Depth]", list(model.model.depths)), depths, strict=True):
        assert own.packed is not None
        for tensor in (*depth.gain.parameters(), *([] if depth.prefix is None else [depth.prefix])):
            tensor.data = tensor.data.to(formats.dtype)
            others += tensor.nbytes
        depth.pack(
            model.model.parts_of(depth), workshop, (formats.adapters or formats.weights, formats.weights), own.packed
        )
    return workshop.num_bytes + others


def _convert(model: nn.Module, dtype: torch.dtype, is_meant: Callable[[nn.Module], bool], copies: bool = False) -> None:
    """Gives parameters that modules hold themselves a dtype. Buffers keep theirs: frequencies need float32."""
    for module in model.modules():
        if is_meant(module) and not isinstance(module, IntegerWeight):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype, copy=copies)


def _settle(settings: PackSettings, device: torch.device) -> PackSettings:
    """Returns settings without None and without a dtype that is slow on the device."""
    wants_half = settings.weights != "float32"
    floats = "bfloat16" if wants_half and computes_fast(torch.bfloat16, device) else "float32"
    found: dict[str, str] = {}
    for name, own in (("weights", floats), ("head", floats), ("adapters", None)):
        asked = cast("str | None", getattr(settings, name))
        found[name] = asked or own or ("int8" if settings.weights in INTEGERS and device.type == "cpu" else floats)
        if found[name] in INTEGERS and device.type != "cpu":
            raise RefoldError(
                f"{name}: float32 or bfloat16 is required on {device.type} (got {asked}); integers are for the cpu"
            )
        if found[name] not in INTEGERS and found[name] != floats:
            logger.warning(f"{name}: held in {floats}, the dtype of activations here, instead of {asked}")
            found[name] = floats
    kept = settings.keep_dense, settings.keep_integers
    return PackSettings(found["weights"], found["head"], found["adapters"], *kept, FLOATS[floats])
