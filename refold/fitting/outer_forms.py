"""Forms of the embedding and the head, by bits, with losses measured on the text."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refold.blueprint.integers import find_scheme
from refold.calibration.layers import EMBEDDING, SourceLayers
from refold.fitting.form_costs import matrix_costs
from refold.fitting.kinds.kind import mean_loss
from refold.fitting.menu import MatrixForm, MenuMatrix
from refold.fitting.sensitivity_pass import Ends
from refold.nn.norms import StackNorm
from refold.nn.rounding import round_weight

HEAD = "lm_head.weight"
HEAD_TOKENS = 256
"""Tokens on which the head is measured."""
ROWS_AT_ONCE = 8192
"""Rows of a table that are rounded at once."""


def outer_matrices(
    layers: SourceLayers, input_ids: Int[Tensor, "B T"], ends: Ends, schemes: Sequence[str], seed: int
) -> tuple[MenuMatrix, ...]:
    """Returns the embedding, and the head if it is not the embedding, each whole by every scheme.

    The loss of a rounded embedding is E[(g . e)^2] / 2 over the tokens of the text, with e the error of the token's row
    and g the gradient at the first residual stream. The loss of a rounded head is the Kullback-Leibler divergence to
    second order, Var_p(d) / 2 for changes d of the logits, on some tokens. A tied head has both.

    Args:
        layers: Layers of the source.
        input_ids: The tokens of the text.
        ends: Both ends of the stack on them.
        schemes: Schemes that are offered, most precise first.
        seed: Seed of the choice of tokens.
    """
    arch = layers.arch
    size = (arch.vocab_size, arch.hidden_size)
    reading = dict(zip(schemes, _embedding_losses(layers, input_ids, ends.first_gradient, schemes), strict=True))
    deciding = dict(zip(schemes, _head_losses(layers, ends.last_stream, schemes, seed), strict=True))
    if arch.tied_head:
        tied = {scheme: reading[scheme] + deciding[scheme] for scheme in schemes}
        return (_matrix("embedding", size, tied, is_head=True),)
    return (
        _matrix("embedding", size, reading, is_head=False),
        _matrix("head", size, deciding, is_head=True),
    )


def _matrix(name: str, size: tuple[int, int], losses: dict[str, float], is_head: bool) -> MenuMatrix:
    forms = []
    for scheme, loss in ((None, 0.0), *losses.items()):
        costs = matrix_costs(*size, scheme, None)
        # Reading a row of the embedding takes no products.
        costs = costs if is_head else costs._replace(flops=0.0)
        forms.append(MatrixForm(rank=None, scheme=scheme, loss=loss, costs=costs))
    return MenuMatrix(name=name, rows=size[0], columns=size[1], forms=tuple(forms))


def _embedding_losses(
    layers: SourceLayers, input_ids: Tensor, gradient: Tensor, schemes: Sequence[str]
) -> Iterator[float]:
    tokens, places = input_ids.unique(return_inverse=True)
    table = layers.pieces.read(EMBEDDING, None, getattr(torch, layers.model.dtype))[tokens].float()
    for scheme in schemes:
        rounded = round_weight(table, find_scheme(scheme), torch.ones(table.shape[1])).dequantise()
        errors = (rounded - table) * layers.arch.embedding_scale
        yield mean_loss(gradient.flatten(0, 1), errors[places.flatten()])


def _head_losses(layers: SourceLayers, stream: Tensor, schemes: Sequence[str], seed: int) -> Iterator[float]:
    arch = layers.arch
    flat = stream.flatten(0, 1)
    generator = torch.Generator().manual_seed(seed)
    chosen = flat[torch.randperm(len(flat), generator=generator)[:HEAD_TOKENS]]
    norm = StackNorm(arch.norm, arch.hidden_size)
    read = {name: layers.pieces.read(f"norm.{name}", None, torch.float32) for name in norm.state_dict()}
    norm.load_state_dict(read, assign=True)
    with torch.no_grad():
        states = norm(chosen)
    name = EMBEDDING if arch.tied_head else HEAD
    table = layers.pieces.read(name, None, getattr(torch, layers.model.dtype))
    logits = torch.cat([states @ rows.float().T for rows in table.split(ROWS_AT_ONCE)], dim=1)
    slope = torch.ones(())
    if arch.logit_softcap is not None:
        bent = torch.tanh(logits / arch.logit_softcap)
        logits, slope = bent * arch.logit_softcap, 1 - bent.square()
    chances = logits.softmax(dim=-1)
    for scheme in schemes:
        changes = torch.cat([states @ _rounding_error(rows.float(), scheme).T for rows in table.split(ROWS_AT_ONCE)], 1)
        yield half_variance(chances, changes * slope)


def half_variance(chances: Float[Tensor, "S N"], changes: Float[Tensor, "S N"]) -> float:
    """Returns Var_p(d) / 2, the Kullback-Leibler divergence by changes d of logits to second order, mean over rows."""
    mean = (chances * changes).sum(dim=-1, keepdim=True)
    return float((chances * (changes - mean).square()).sum(dim=-1).double().mean()) / 2


def _rounding_error(rows: Float[Tensor, "N D"], scheme: str) -> Float[Tensor, "N D"]:
    return round_weight(rows, find_scheme(scheme), torch.ones(rows.shape[1])).dequantise() - rows
