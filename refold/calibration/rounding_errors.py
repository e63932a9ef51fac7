"""Predicted losses of integers and ranks: 0.5 tr(G D C D^T) nats per token for a change D of a weight; no text is run.

C and G are the second moments of the linear's inputs and of the gradients at its outputs (`Moments`), so the loss is a
second-order estimate with the Fisher matrix as a Kronecker product (arXiv 1503.05671). Without G it is half the
squared error of the outputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from refold.blueprint.integers import Scheme, find_scheme
from refold.calibration.feedback import round_by_schemes, round_with_feedback
from refold.calibration.integer_factors import balance_factors, round_factors
from refold.calibration.weighting import INPUT_RIDGE, OUTPUT_RIDGE, Moments, Weighting, ridged

ROWS = 256
"""Rows of a matrix that `MatrixErrors` rounds; the others are estimated from them."""
JITTER = 1e-9
"""Share of the diagonal that is added to a moment of full rank before its decomposition."""


def weighted_error(change: Float[Tensor, "out in"], moments: Moments) -> float:
    """Returns 0.5 tr(G D C D^T) for a change D of the weight, G the identity where gradients were not measured."""
    return moments.error(change) * (0.5 if moments.outputs is None else 1.0)


def rounding_errors(weight: Float[Tensor, "out in"], moments: Moments, scheme: Scheme) -> float:
    """Returns the error of a weight that is rounded with feedback by its moments."""
    rounded = round_with_feedback(weight.float(), moments.inputs, scheme)
    return weighted_error(rounded.dequantise() - weight, moments)


def factored_error(weight: Float[Tensor, "out in"], moments: Moments, rank: int, scheme: Scheme | None) -> float:
    """Returns the error of a weight stored as two factors, whitened as a conversion does and rounded with feedback.

    Args:
        weight: The weight.
        moments: Of the linear.
        rank: Of the factors, at least 1.
        scheme: Scheme of both factors; None: floats.
    """
    a, b = _weighting(moments).truncate(weight.float(), rank, "exact", 0).factors()
    if scheme is not None:
        a, b = (each.dequantise() for each in round_factors(a, b, moments.inputs, scheme))
    return weighted_error(b.double() @ a.double() - weight.double(), moments)


class MatrixErrors:
    """The errors of one matrix for many ranks and schemes, from one decomposition and from a sample of its rows.

    Rounding treats rows of a matrix apart. So a sample of rows, drawn in proportion to their expected error, is rounded
    by all schemes at once, and its error is scaled to all rows. The factors of a rank are the first rows and columns of
    those of the full rank, and so are their rounding errors; one rounding of the full factors serves all ranks.

    Args:
        weight: The weight.
        moments: Of the linear.
        rows: Rows to round; a matrix with fewer rows is rounded whole.
        seed: Seed of the sample.
    """

    def __init__(self, weight: Float[Tensor, "out in"], moments: Moments, rows: int = ROWS, seed: int = 0):
        self._weight, self._moments, self._rows, self._seed = weight.float(), moments, rows, seed
        self._factors: tuple[Tensor, Tensor] | None = None
        self._beyond: Tensor | None = None

    def whole(self, schemes: Sequence[str]) -> dict[str, float]:
        """Returns the error of the whole matrix by scheme."""
        rows, shares = self._draw(self._weight, self._moments.inputs.diagonal(), self._output_diagonal())
        chosen = self._weight[rows]
        found = {}
        for name, rounded in self._round(chosen, self._moments.inputs, schemes):
            change = rounded - chosen
            if len(rows) == len(self._weight):
                found[name] = weighted_error(change, self._moments)
            else:
                own = 0.5 * float((_errors(change, self._moments.inputs) * shares).sum())
                shrunk = _shrinkage(change, chosen, self._moments.inputs, shares)
                found[name] = own + shrunk**2 * self._across
        return found

    @cached_property
    def _across(self) -> float:
        """Returns the error of -W that errors of rows apart do not show: rows shrink together."""
        apart = Moments(self._moments.inputs, torch.diag(self._output_diagonal()))
        return weighted_error(self._weight, self._moments) - weighted_error(self._weight, apart)

    def factored(self, ranks: Iterable[int], schemes: Sequence[str | None]) -> dict[tuple[int, str | None], float]:
        """Returns the error of two factors by rank and scheme.

        Args:
            ranks: At least 1, at most the smaller side of the matrix.
            schemes: Names of schemes of both factors; None: floats, whose errors are exact.
        """
        asked, names = list(ranks), [name for name in schemes if name is not None]
        beyond = self._truncation()
        noise = self._factor_noise(names) if names else {}
        return {
            (rank, name): float(beyond[rank]) + (0.0 if name is None else float(noise[name][rank - 1]))
            for rank in asked
            for name in schemes
        }

    def _decompose(self) -> tuple[Tensor, Tensor]:
        """Returns balanced factors of the full rank, float64."""
        if self._factors is None:
            full = min(self._weight.shape)
            a, b = _weighting(self._moments).truncate(self._weight, full, "auto", 0).factors()
            self._factors = balance_factors(a.double(), b.double())
        return self._factors

    def _truncation(self) -> Float[Tensor, " ranks"]:
        """Returns the error of each rank from 0 to the full one: sums over trailing blocks of B^T G B times A C A^T."""
        if self._beyond is None:
            a, _ = self._decompose()
            products = self._gram_of_b * (a @ self._moments.inputs.double() @ a.T)
            # The decomposition is exact at the full rank only up to its rounding.
            blocks = _leading_blocks(products.flip(0, 1)).flip(0)
            self._beyond = 0.5 * torch.cat((blocks, blocks.new_zeros(1))).clamp(min=0)
        return self._beyond

    def _factor_noise(self, schemes: Sequence[str]) -> Mapping[str, Float[Tensor, " ranks"]]:
        """Returns the error of rounding by scheme, for each rank from 1 to the full one."""
        a, b = self._decompose()
        inputs, full = self._moments.inputs.double(), len(a)
        gram = a @ inputs @ a.T
        heavy = self._gram_of_b.diagonal().clamp(min=0)
        places = torch.linspace(0, full - 1, min(full, self._rows)).round().long().unique().to(a.device)
        firsts = dict(self._round(a[places].float(), inputs, schemes))
        columns, shares = self._draw(b.float(), gram.diagonal(), self._output_diagonal())
        seconds = dict(self._round(b[columns].float(), gram, schemes))
        root = _root(gram)
        expected = a.square() @ inputs.diagonal()
        found = {}
        for name in schemes:
            change = firsts[name].double() - a[places]
            # B is fitted to the rounded A, which takes back the errors inside the space of the first rows of A.
            seen = torch.linalg.solve_triangular(root, a @ inputs @ change.T, upper=False).T
            outside = _errors(change, inputs).unsqueeze(1) - seen.square().cumsum(1)
            ratios = outside.clamp(min=0) / expected[places].clamp(min=1e-300).unsqueeze(1)
            own = _stretch(ratios, places, full) * expected.unsqueeze(1)
            first = (heavy.unsqueeze(1) * own).cumsum(0).diagonal()
            change = seconds[name].double() - b[columns]
            # Inputs of B are those of the rounded A.
            seen = gram + torch.diag(own.diagonal())
            if len(columns) == len(b):
                second = _leading_blocks(self._second_gram(change) * seen)
            else:
                second = _leading_blocks(((change.T * shares.double()) @ change) * seen)
                shrunk = _shrinkage(change, b[columns], gram, shares)
                apart = (b.T * self._output_diagonal().double()) @ b
                second += shrunk**2 * _leading_blocks((self._gram_of_b - apart) * gram)
            found[name] = 0.5 * (first + second)
        return found

    @cached_property
    def _gram_of_b(self) -> Float[Tensor, "n n"]:
        return self._second_gram(self._decompose()[1])

    def _second_gram(self, b: Tensor) -> Tensor:
        outputs = self._moments.outputs
        return b.T @ b if outputs is None else b.T @ outputs.double() @ b

    def _output_diagonal(self) -> Float[Tensor, " out"]:
        outputs = self._moments.outputs
        return self._weight.new_ones(len(self._weight)) if outputs is None else outputs.diagonal().float()

    def _round(self, rows: Tensor, moment: Tensor, schemes: Sequence[str]) -> Iterable[tuple[str, Tensor]]:
        found = round_by_schemes(rows, moment, [find_scheme(name) for name in schemes])
        return [(name, each.dequantise()) for name, each in zip(schemes, found, strict=True)]

    def _draw(self, matrix: Tensor, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Float[Tensor, " some"]]:
        """Returns rows drawn in proportion to their expected error, and the weight of the error of each.

        Args:
            matrix: `[out, in]`.
            inputs: Weight of each input.
            outputs: Weight of each row.
        """
        num_rows = len(matrix)
        if num_rows <= self._rows:
            return torch.arange(num_rows, device=matrix.device), outputs
        size = (matrix.square() @ inputs.to(matrix.dtype)) * outputs
        size = size + 0.1 * size.mean() + torch.finfo(size.dtype).tiny
        chance = size / size.sum()
        generator = torch.Generator().manual_seed(self._seed)
        begin = float(torch.rand(1, generator=generator))
        ticks = (torch.arange(self._rows, device=matrix.device) + begin) / self._rows
        drawn = torch.searchsorted(chance.cumsum(0), ticks.to(chance.dtype)).clamp(max=num_rows - 1)
        rows, times = drawn.unique(return_counts=True)
        return rows, outputs[rows] * times / (self._rows * chance[rows])


def _weighting(moments: Moments) -> Weighting:
    outputs = None if moments.outputs is None else ridged(moments.outputs, OUTPUT_RIDGE)
    return Weighting(ridged(moments.inputs, INPUT_RIDGE), outputs)


def _root(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Returns a Cholesky factor. A text with fewer tokens than inputs gives a singular matrix, which gets a ridge."""
    diagonal = gram.diagonal()
    most = float(diagonal.max())
    ridge, share = JITTER * diagonal.clamp(min=JITTER * most), JITTER
    while True:
        root, failed = torch.linalg.cholesky_ex(gram + torch.diag(ridge))
        if not failed or share > 1:
            return root
        share *= 10
        ridge = ridge + share * most


def _errors(change: Float[Tensor, "rows in"], moment: Tensor) -> Float[Tensor, " rows"]:
    """Returns d C d^T of each row d."""
    return (change @ moment.to(change.dtype) * change).sum(1)


def _shrinkage(change: Tensor, rows: Tensor, moment: Tensor, shares: Tensor) -> float:
    """Returns the s for which -s times the rows is the part of their change that all rows have in common."""
    seen = rows @ moment.to(rows.dtype)
    both, whole = ((seen * each).sum(1) @ shares.to(rows.dtype) for each in (change.to(rows.dtype), rows))
    return -float(both) / max(float(whole), 1e-300)


def _leading_blocks(products: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """Returns the sum of the leading k x k block for each k from 1 to n."""
    return products.cumsum(0).cumsum(1).diagonal().clone()


def _stretch(values: Float[Tensor, "some n"], places: Tensor, length: int) -> Float[Tensor, "length n"]:
    """Returns rows at places as a function of all places, linear between two."""
    every = torch.arange(length, device=places.device)
    right = torch.searchsorted(places, every).clamp(max=len(places) - 1)
    left = (right - (places[right] > every).long()).clamp(min=0)
    gap = (places[right] - places[left]).clamp(min=1)
    share = ((every - places[left]).double() / gap).unsqueeze(1)
    return values[left] * (1 - share) + values[right] * share
