"""Which layers and parts a recipe leaves out."""

from collections.abc import Sequence

from refold.blueprint.recipe import BlockDrop, PartDrop
from refold.blueprint.spacing import evenly_spaced
from refold.errors import RecipeError


def dropped_blocks(drop: BlockDrop, num_layers: int, layer_parameters: int, other_parameters: int) -> frozenset[int]:
    """Returns the source layers that are left out whole.

    Args:
        drop: The recipe's `drop.block`.
        num_layers: Source layers.
        layer_parameters: Parameters of one layer.
        other_parameters: Non-embedding parameters outside the layers: the final norm.

    Raises:
        RecipeError: Nothing would remain, or a layer is out of range.
    """
    if drop.parameters is not None:
        kept = min(num_layers, (drop.parameters - other_parameters) // layer_parameters)
        if kept < 1:
            raise RecipeError(
                f"drop.block.parameters: at least {layer_parameters + other_parameters:,} are required for one layer "
                f"(got {drop.parameters:,}); raise the budget"
            )
        drop = BlockDrop(count=num_layers - kept)
    dropped = _dropped(drop, tuple(range(num_layers)), "drop.block", num_layers)
    if len(dropped) == num_layers:
        raise RecipeError(f"drop.block: at least one layer must remain (all {num_layers} would go); drop fewer")
    return dropped


def dropped_parts(drop: PartDrop, layers: Sequence[int], where: str, num_layers: int) -> frozenset[int]:
    """Returns the source layers whose attention or MLP is left out.

    Args:
        drop: The recipe's `drop.attention` or `drop.mlp`.
        layers: Source layers that are still there.
        where: Key path for messages.
        num_layers: Source layers.

    Raises:
        RecipeError: More than there are, or a layer that is out of range or already gone.
    """
    return _dropped(drop, tuple(layers), where, num_layers)


def _dropped(drop: PartDrop, layers: tuple[int, ...], where: str, num_layers: int) -> frozenset[int]:
    if drop.layers is not None:
        for layer in drop.layers:
            if layer >= num_layers:
                raise RecipeError(
                    f"{where}.layers: layer {layer} is out of range ({num_layers} source layers: 0..{num_layers - 1})"
                )
            if layer not in layers:
                raise RecipeError(f"{where}.layers: layer {layer} is left out already; take it off the list")
        return frozenset(drop.layers)
    count = drop.count if drop.share is None else round(drop.share * len(layers))
    assert count is not None
    if count > len(layers):
        raise RecipeError(f"{where}.count: at most {len(layers)} can be left out (got {count}); lower it")
    kept = {layers[index] for index in evenly_spaced(len(layers), len(layers) - count)}
    return frozenset(layers) - kept
