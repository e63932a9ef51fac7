"""Alignment of tied layers: permutations of neurons and heads, and rotations of values, that bring layers together.

Two layers may compute the same function with their neurons in different orders; the mean of their weights then mixes
unrelated neurons. Neurons are matched as in Git Re-Basin (arXiv 2209.04836), but between layers of one model. Values of
a head may be rotated by any orthogonal matrix, because the output projection can undo the rotation.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from refold.blueprint.origins import Align
from refold.blueprint.schema import Blueprint, Pool
from refold.calibration.frames import HeadFrame, LayerFrame, assign
from refold.families.arch import ArchSpec
from refold.mixers.attention import attention_linears
from refold.mixers.spec import MLP
from refold.planning.fold import aligned_groups
from refold.sources.pieces import PieceReader

Weights = Mapping[str, Tensor]
"""The weights of one layer's attention or MLP, by linear."""
HEADED = ("q_proj", "k_proj", "v_proj", "o_proj")
ROUNDS = 3
"""Number of times that each layer of a group of three or more is matched to the mean of the others."""
TURNS = 2
"""Number of alternations between matching query heads and rotating values."""


def align_layers(blueprint: Blueprint, align: Align, pieces: PieceReader, device: str = "cpu") -> dict[int, LayerFrame]:
    """Finds the frames of tied layers; the first layer of each group keeps its frame.

    The weights of one stored part are in memory at a time.

    Args:
        blueprint: The folded model, which ties the layers.
        align: Permutations of neurons and heads (`permutation`), rotations of values (`rotation`), or both.
        pieces: Reader of the source.
        device: Device that computes.

    Raises:
        SourceError: Weights are not finite, so they cannot be matched.
    """
    arch = blueprint.arch
    neurons: dict[int, LayerFrame] = {}
    heads: dict[int, LayerFrame] = {}
    if align in ("permutation", "both"):
        for layers in aligned_groups(blueprint, "mlp"):
            neurons |= _match(_read(pieces, "mlp", MLP.linears(arch), layers, device), match_neurons)
    for layers in aligned_groups(blueprint, "mixer"):
        weights = _read(pieces, "mixer", attention_linears(arch), layers, device)
        heads |= _match(weights, lambda ours, theirs: match_heads(arch, ours, theirs, align))
    plain = LayerFrame()
    return {
        layer: LayerFrame(neurons.get(layer, plain).neurons, heads.get(layer, plain).heads)
        for layer in sorted({*neurons, *heads})
    }


def match_neurons(ours: Weights, theirs: Weights) -> LayerFrame:
    """Finds the order in which the neurons of one MLP are nearest to those of another."""
    scores = sum(theirs[name] @ ours[name].T for name in theirs if name != "down_proj")
    return LayerFrame(neurons=assign(scores + theirs["down_proj"].T @ ours["down_proj"]).cpu())


def match_heads(arch: ArchSpec, ours: Weights, theirs: Weights, align: Align) -> LayerFrame:
    """Finds the order of heads, and the rotations of values, in which one attention is nearest to another.

    A key-value head moves together with the query heads that read it; these may also change places among themselves.
    """
    groups, size = arch.num_key_value_heads, arch.head_dim
    readers = arch.num_attention_heads // groups
    mine, other = (_split_heads(each, groups, size) for each in (ours, theirs))
    # For every pair of key-value heads: their agreement under the best order and rotation.
    pairs = [(there, here) for there in range(groups) for here in range(groups)]
    if align == "rotation":
        pairs = [(head, head) for head in range(groups)]
    scores = torch.full((groups, groups), -torch.inf)
    orders: dict[tuple[int, int], Tensor] = {}
    turns: dict[tuple[int, int], Tensor] = {}
    for there, here in pairs:
        q, k, v, o = (other[name][there] for name in HEADED)
        own_q, own_k, own_v, own_o = (mine[name][here] for name in HEADED)
        order, turn = torch.arange(readers), torch.eye(size, device=v.device)
        for _ in range(TURNS):
            if align != "rotation":
                alike = torch.einsum("rkd,skd->rs", q, own_q)
                alike = alike + torch.einsum("rkd,skd->rs", o, torch.einsum("kl,sld->skd", turn, own_o))
                order = assign(alike).cpu()
            product = v @ own_v.T + torch.einsum("rkd,rld->kl", o, own_o[order])
            if align != "permutation":
                left, _, right = torch.linalg.svd(product.double())
                turn = (left @ right).to(v)
        scores[there, here] = (k * own_k).sum() + (q * own_q[order]).sum() + (product * turn).sum()
        orders[there, here], turns[there, here] = order, turn.cpu()
    places = torch.arange(groups) if align == "rotation" else assign(scores)
    chosen = [(there, int(here)) for there, here in enumerate(places)]
    queries = torch.cat([here * readers + orders[there, here] for there, here in chosen])
    return LayerFrame(heads=HeadFrame(queries, places, torch.stack([turns[pair] for pair in chosen])))


def _split_heads(weights: Weights, groups: int, size: int) -> dict[str, Tensor]:
    """Splits weights by key-value head: queries and outputs `[G, readers, K, D]`, keys and values `[G, K, D]`."""
    return {
        "q_proj": weights["q_proj"].unflatten(0, (groups, -1, size)),
        "k_proj": weights["k_proj"].unflatten(0, (groups, size)),
        "v_proj": weights["v_proj"].unflatten(0, (groups, size)),
        "o_proj": weights["o_proj"].T.unflatten(0, (groups, -1, size)),
    }


def _read(
    pieces: PieceReader, pool: Pool, names: Collection[str], layers: Sequence[int], device: str
) -> Mapping[int, Weights]:
    found: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    for layer in layers:
        for name in names:
            found[layer][name] = pieces.read(f"{pool}.{name}.weight", layer, torch.float32).to(device)
    return found


def _match(weights: Mapping[int, Weights], find: Callable[[Weights, Weights], LayerFrame]) -> dict[int, LayerFrame]:
    """Matches all layers to the first; three or more are then each matched to the mean of the others."""
    first, *others = weights
    frames = {layer: find(weights[layer], weights[first]) for layer in others}
    for _ in range(ROUNDS if len(others) > 1 else 0):
        for layer in others:
            rest = [other for other in weights if other != layer]
            mean = {
                name: torch.stack([_framed(frames.get(other), name, weights[other][name]) for other in rest]).mean(
                    dim=0
                )
                for name in weights[layer]
            }
            frames[layer] = find(weights[layer], mean)
    return frames


def _framed(frame: LayerFrame | None, linear: str, weight: Tensor) -> Tensor:
    return weight if frame is None else frame.weight(linear, weight)
