"""Activations inside a model: the residual stream between its layers, the outputs of its mixers, attention weights."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from refold.errors import HealError
from refold.families.registry import find_family
from refold.modeling.depth import Depth
from refold.modeling.model import RefoldForCausalLM
from refold.nn.mixers.attention import AttentionView
from refold.scoring.head import Predictions
from refold.scoring.predict import ExitPredictions, head_of, read_exits

Want = Literal["predictions", "streams", "mixers", "attentions", "exits"]
"""Names of the activations that an objective may request from a forward pass."""


@dataclass
class Activations:
    """Holds the activations of one forward pass, by layer. A layer of a folded model is a depth.

    Attributes:
        predictions: last hidden states, after the final norm, and the head.
        source_layers: for each layer the source layer it stands for.
        streams: the residual stream before each layer and, as the last element, after the last layer, before the final
            norm.
        mixers: layer to the output of its mixer; layers without a mixer have no entry.
        attentions: layer to attention weights `[B, H, T, T]`; layers without attention have no entry.
        exits: predictions of a folded model at each of its early exits, top to bottom.
    """

    predictions: Predictions
    source_layers: list[int] = field(default_factory=list)
    streams: list[Float[Tensor, "B T D"]] = field(default_factory=list)
    mixers: dict[int, Float[Tensor, "B T D"]] = field(default_factory=dict)
    attentions: dict[int, Tensor] = field(default_factory=dict)
    exits: list[ExitPredictions] = field(default_factory=list)


def observe(
    model: PreTrainedModel,
    input_ids: Int64[Tensor, "B T"],
    position_ids: Int64[Tensor, "B T"],
    wants: frozenset[Want],
) -> Activations:
    """Runs a model once, without a cache and without logits, and returns the requested activations.

    Args:
        model: a folded model or a source, as transformers loads it.
        input_ids: tokens.
        position_ids: a position that is lower than the one before begins a new document, which sees no other document.
        wants: activations to return besides the predictions.

    Raises:
        HealError: the model's layers cannot be observed, or `attentions` are requested and the model does not use eager
            attention, the only implementation that returns attention weights.
    """
    stack: Any = model.base_model
    streams: list[Tensor] = []
    mixed: list[Tensor] = []
    options: dict[str, Any] = {}
    if "attentions" in wants:
        require_eager(model)
        options["output_attentions"] = True
    if "exits" in wants:
        options["output_exits"] = True
    with contextlib.ExitStack() as hooks:
        if "streams" in wants:
            for hook in _watch_streams(stack_layers(model), streams):
                hooks.enter_context(hook)
        if "mixers" in wants:
            for hook in _watch_outputs(mixer_modules(model), mixed):
                hooks.enter_context(hook)
        output = stack(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options)
    found = Activations(Predictions(output.last_hidden_state, head_of(model)), source_layers(model), streams)
    if "exits" in wants:
        found.exits = read_exits(model, output)
    if "mixers" in wants:
        found.mixers = dict(zip(mixing_layers(model), mixed, strict=True))
    if "attentions" in wants:
        found.attentions = dict(zip(attention_layers(model), output.attentions, strict=True))
    return found


def require_eager(model: PreTrainedModel) -> None:
    """Checks that a model returns its attention weights.

    Raises:
        HealError: the model does not use eager attention.
    """
    if model.config._attn_implementation != "eager":
        raise HealError(
            f"attn_implementation: eager attention is required to read attention weights (got "
            f"{model.config._attn_implementation}); load the model with attn_implementation='eager'"
        )


def stack_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the modules of a model's layers, top to bottom; for a folded model its depths."""
    stack: Any = model.base_model
    # A model with other parts than text has its text layers in the decoder.
    layers = stack.depths if isinstance(model, RefoldForCausalLM) else getattr(stack.get_decoder(), "layers", None)
    if layers is None or len(layers) != _num_layers(model):
        raise HealError(f"objective: layers that can be observed are required ({type(model).__name__} has other ones)")
    return list(layers)


def _num_layers(model: PreTrainedModel) -> int:
    return model.config.get_text_config().num_hidden_layers


def mixing_layers(model: PreTrainedModel) -> list[int]:
    """Returns the layers that have a mixer, in the order they run."""
    if isinstance(model, RefoldForCausalLM):
        return [index for index, depth in enumerate(folded_depths(model)) if depth.spec.mixer is not None]
    return list(range(_num_layers(model)))


def attention_layers(model: PreTrainedModel) -> list[int]:
    """Returns the layers whose mixer is softmax attention, in the order they run."""
    if isinstance(model, RefoldForCausalLM):
        return [index for index, depth in enumerate(folded_depths(model)) if isinstance(depth.view, AttentionView)]
    return list(range(_num_layers(model)))


def source_layers(model: PreTrainedModel) -> list[int]:
    """Returns, for each layer of a model, the source layer it stands for; a layer of a source stands for itself."""
    if isinstance(model, RefoldForCausalLM):
        return [depth.spec.source for depth in folded_depths(model)]
    return list(range(_num_layers(model)))


def num_source_layers(model: PreTrainedModel) -> int:
    """Returns the number of layers of the source that a model's layers stand for."""
    if isinstance(model, RefoldForCausalLM):
        return model.config.read_blueprint().arch.num_layers
    return _num_layers(model)


def folded_depths(model: RefoldForCausalLM) -> list[Depth]:
    """Returns the depths of a folded model, top to bottom."""
    return cast("list[Depth]", list(model.model.depths))


def mixer_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the modules whose outputs mixers add to the residual stream, each module once even if it runs often."""
    if isinstance(model, RefoldForCausalLM):
        return list(model.model.mixers)
    family = find_family(cast("str", model.config.model_type))
    names = {piece: rule.source for rule in family.rules for piece in rule.pieces}
    # In families with a norm after the output projection, this norm gives the mixer's output.
    norm = names.get("mixer.output_norm.weight")
    path = norm or names["mixer.o_proj.weight"].removesuffix(".weight")
    path = path.rpartition(".")[0]
    modules = dict(model.named_modules())
    return [modules[path.format(layer=layer)] for layer in range(_num_layers(model))]


def _watch_streams(layers: list[nn.Module], kept: list[Tensor]) -> Iterator[Any]:
    def before(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        kept.append(arguments[0] if arguments else keywords["hidden_states"])

    def after(module: nn.Module, arguments: tuple, output: Any) -> None:
        kept.append(_first(output))

    for layer in layers:
        yield _removed(layer.register_forward_pre_hook(before, with_kwargs=True))
    yield _removed(layers[-1].register_forward_hook(after))


def _watch_outputs(modules: list[nn.Module], kept: list[Tensor]) -> Iterator[Any]:
    def after(module: nn.Module, arguments: tuple, output: Any) -> None:
        kept.append(_first(output))

    for module in modules:
        yield _removed(module.register_forward_hook(after))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def _removed(handle: Any) -> Iterator[None]:
    """Removes a hook at the end, so that it does not run when gradient checkpointing repeats the forward pass."""
    try:
        yield
    finally:
        handle.remove()
