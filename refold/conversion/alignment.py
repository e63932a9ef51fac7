"""Tied layers brought into a common frame: neurons and heads in the order, and values in the axes, of those they meet.

Layers that compute alike may have their neurons in different orders, and then their mean is of unlike things. Neurons
are matched as in Git Re-Basin (arXiv 2209.04836), here layers of one model; the values of a head may be turned by any
orthogonal matrix that its output projection undoes.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from refold.blueprint.initialisation import Align
from refold.blueprint.schema import Blueprint, Pool
from refold.calibration.frames import HeadFrame, LayerFrame, assign
from refold.families.arch import ArchSpec
from refold.mixers.attention import attention_linears
from refold.mixers.mlp import MLP
from refold.planning.fold import aligned_groups
from refold.sources.pieces import PieceReader

Weights = Mapping[str, Tensor]
"""Of one layer's attention or MLP, by linear."""
HEADED = ("q_proj", "k_proj", "v_proj", "o_proj")
ROUNDS = 3
"""How often layers of a group of three and more are matched to the mean of the others."""
TURNS = 2
"""How often query heads are matched and values turned in turn."""


def align_layers(blueprint: Blueprint, align: Align, pieces: PieceReader, device: str = "cpu") -> dict[int, LayerFrame]:
    """Finds the frames of tied layers, one stored part's in memory at a time; those of the first stay as they are.

    Args:
        blueprint: Says which layers are tied.
        align: What may be exchanged (`permutation`) and turned (`rotation`).
        pieces: Reads the source.
        device: Where to compute.

    Raises:
        SourceError: Weights are not finite, which nothing can be matched to.
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
    """Finds the order in which one MLP's neurons come nearest to another's."""
    scores = sum(theirs[name] @ ours[name].T for name in theirs if name != "down_proj")
    return LayerFrame(neurons=assign(scores + theirs["down_proj"].T @ ours["down_proj"]).cpu())


def match_heads(arch: ArchSpec, ours: Weights, theirs: Weights, align: Align) -> LayerFrame:
    """Finds the order in which one attention's heads, and the axes in which its values, come nearest to another's.

    Key-value heads may change places with the query heads that read them, and those among themselves.
    """
    groups, size = arch.num_key_value_heads, arch.head_dim
    readers = arch.num_attention_heads // groups
    mine, other = (_split_heads(each, groups, size) for each in (ours, theirs))
    # Of every pair of key-value heads: how well the best order and turn make them agree.
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
    """Queries and outputs `[G, readers, K, D]`, keys and values `[G, K, D]`."""
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
    """Matches all layers to the first, and three and more then to the mean of the others in turn."""
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
