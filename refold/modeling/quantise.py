"""Rounds weights of linears to the values of a weight-only quantisation; they keep their dtype and place."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from refold.blueprint.integers import Scheme
from refold.blueprint.quantisation import describe_schemes, holds_integers, is_quantised
from refold.blueprint.tensors import float_tensors
from refold.errors import RefoldError
from refold.modeling.model import RefoldForCausalLM
from refold.nn.rounding import round_weight


def quantise_linears(model: PreTrainedModel, scheme: Scheme) -> list[Tensor]:
    """Rounds the weight of every linear but the head; a weight that several depths run is rounded once.

    In a folded model `is_quantised` selects the weights, among them factors and coefficients of bases. In a source the
    weight of every `nn.Linear` is rounded.

    Args:
        model: Changed in place.
        scheme: Bits, group and zero point of the rounding.

    Returns:
        The weights that were rounded.

    Raises:
        RefoldError: Weights of the model are stored as integers.
    """
    weights = _of_blueprint(model) if isinstance(model, RefoldForCausalLM) else _of_source(model)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(round_to_nearest(weight, scheme))
    return weights


def _of_blueprint(model: RefoldForCausalLM) -> list[Tensor]:
    blueprint = model.config.read_blueprint()
    if holds_integers(blueprint):
        raise RefoldError(
            f"quantise: weights of floats are required (got {describe_schemes(blueprint)}); omit it, the model is "
            f"quantised already"
        )
    return [model.get_parameter(each.name) for each in float_tensors(blueprint) if is_quantised(blueprint, each)]


def _of_source(model: PreTrainedModel) -> list[Tensor]:
    head = model.get_output_embeddings()
    outside = {id(module.weight) for module in (head, model.get_input_embeddings()) if module is not None}
    found = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    return [weight for key, weight in found.items() if key not in outside]


def round_to_nearest(weight: Float[Tensor, "out in"], scheme: Scheme) -> Float[Tensor, "out in"]:
    """Returns the dequantised weight, `scale * (integer - zero_point)`, in float32."""
    return round_weight(weight, scheme).dequantise()
