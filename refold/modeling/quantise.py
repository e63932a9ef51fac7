"""Rounds weights of linears to the values of a weight-only quantisation; they keep their dtype and place."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from refold.blueprint.quantisation import Scheme, is_quantised
from refold.blueprint.tensors import target_tensors
from refold.modeling.model import RefoldForCausalLM


def quantise_linears(model: PreTrainedModel, scheme: Scheme) -> list[Tensor]:
    """Rounds the weight of every linear but the head; a weight that several depths run is rounded once.

    In a folded model `is_quantised` selects the weights, among them factors and coefficients of bases. In a source the
    weight of every `nn.Linear` is rounded.

    Args:
        model: Changed in place.
        scheme: Bits, group and zero point of the rounding.

    Returns:
        The weights that were rounded.
    """
    weights = _of_blueprint(model) if isinstance(model, RefoldForCausalLM) else _of_source(model)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(round_to_nearest(weight, scheme))
    return weights


def _of_blueprint(model: RefoldForCausalLM) -> list[Tensor]:
    blueprint = model.config.read_blueprint()
    return [model.get_parameter(each.name) for each in target_tensors(blueprint) if is_quantised(blueprint, each)]


def _of_source(model: PreTrainedModel) -> list[Tensor]:
    head = model.get_output_embeddings()
    outside = {id(module.weight) for module in (head, model.get_input_embeddings()) if module is not None}
    found = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    return [weight for key, weight in found.items() if key not in outside]


def round_to_nearest(weight: Float[Tensor, "out in"], scheme: Scheme) -> Float[Tensor, "out in"]:
    """Returns the dequantised weight, `scale * (integer - zero_point)`, in float32.

    Each integer is the nearest one to its weight; no text calibrates the rounding. Scales are rounded to bfloat16,
    which has float32's range, before integers are chosen.
    """
    rows, columns = weight.shape
    group = scheme.group or columns
    padding = -columns % group
    # Zeros change no group's range: zero lies in every range.
    padded = nn.functional.pad(weight.float(), (0, padding)).view(rows, -1, group)
    if scheme.has_zero_point:
        least, most = 0, 2**scheme.bits - 1
        low, high = padded.amin(-1, keepdim=True).clamp(max=0), padded.amax(-1, keepdim=True).clamp(min=0)
        scale = _as_stored((high - low) / most)
        zero_point = (-low / scale).round().clamp(least, most)
    else:
        most = 2 ** (scheme.bits - 1) - 1
        least = -most
        scale = _as_stored(padded.abs().amax(-1, keepdim=True) / most)
        zero_point = torch.zeros_like(scale)
    integers = ((padded / scale).round() + zero_point).clamp(least, most)
    return (scale * (integers - zero_point)).view(rows, -1)[:, :columns]


def _as_stored(scale: Tensor) -> Tensor:
    scale = scale.bfloat16().float()
    return torch.where(scale > 0, scale, 1.0)
