"""Shrunk moments against their formula, moments by folds against those of the folds alone, and the cross-check."""

import pytest
import torch
from torch import Tensor

from refold.blueprint.integers import SCHEMES
from refold.calibration import shrinkage
from refold.calibration.calibration import CalibrationText
from refold.calibration.feedback import round_with_feedback
from refold.calibration.moments import MomentStore, Shrinkage, measure_moments
from refold.calibration.shrinkage import STRENGTHS, cross_check, fit_low_rank, leave_one_out, number_folds, round_shrunk
from refold.calibration.weighting import Moments, shrunk
from refold.data.packing import PackedSequence
from refold.errors import DataError, SourceError
from refold.nn.rounding import round_weight

SIZE = 10


def draw(tokens: int, seed: int, size: int = SIZE) -> Tensor:
    """Inputs with few strong directions, the same for every seed."""
    scales = torch.logspace(0, -1.5, size)
    turn = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(7))).Q
    return (torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed)) * scales) @ turn


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def matrix(rows: int = 8, columns: int = SIZE) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))


def test_shrunk_moments_follow_the_formula_and_keep_the_trace():
    given = moment(draw(50, 0))
    mean = sum(float(given[place, place]) for place in range(SIZE)) / SIZE
    for strength in (0.1, 0.5, 1.0):
        found = shrunk(given, strength)
        for row in range(SIZE):
            for column in range(SIZE):
                expected = (1 - strength) * float(given[row, column]) + strength * mean * (row == column)
                assert float(found[row, column]) == pytest.approx(expected, abs=1e-6)
        assert float(found.trace()) == pytest.approx(float(given.trace()), rel=1e-5)
    assert shrunk(given, 0.0) is given
    stacked = torch.stack((given, 3 * given))
    assert torch.equal(shrunk(stacked, 0.3)[1], shrunk(3 * given, 0.3))
    assert not torch.equal(shrunk(stacked, 0.3)[0], shrunk(stacked, 0.3)[1])


@pytest.mark.parametrize("with_gradients", [False, True])
def test_the_error_is_that_of_the_tokens(with_gradients):
    x, g, change = draw(40, 1).double(), draw(40, 2, 8).double(), matrix().double()
    given = Moments(moment(x).float(), moment(g).float() if with_gradients else None)
    by_tokens = sum(float((change @ row).square().sum()) for row in x) / len(x)
    # 0.5 E[(g^T D x)^2] with inputs and gradients independent.
    by_pairs = sum(float(row @ change @ other) ** 2 for row in g for other in x) / len(x) / len(g) / 2
    assert given.error(change.float()) == pytest.approx(by_pairs if with_gradients else by_tokens, rel=1e-4)


def sequences(rows: int, vocabulary: int) -> PackedSequence:
    ids = torch.randint(2, vocabulary, (rows, 12), generator=torch.Generator().manual_seed(0))
    return PackedSequence(ids, torch.arange(12).repeat(rows, 1), ids)


def some(packed: PackedSequence, rows: list[int]) -> PackedSequence:
    return PackedSequence(*(column[rows] for column in packed))


@pytest.mark.parametrize("with_gradients", [False, True])
def test_moments_by_folds_are_those_of_the_folds_alone(make_source, open_source, tmp_path, with_gradients):
    opened = open_source(make_source("llama"))
    packed, folds = sequences(5, 90), torch.tensor([0, 1, 1, 0, 1])

    def measure(name: str, text: PackedSequence, numbers: Tensor | None) -> MomentStore:
        (tmp_path / name).mkdir()
        store = MomentStore(tmp_path / name, folds=numbers)
        measure_moments(opened.layers, text, store, tmp_path / name, with_gradients=with_gradients)
        return store

    # Labels are drawn, so gradients of other batches differ: inputs alone are compared with those of the folds alone.
    whole, folded = measure("whole", packed, None), measure("folded", packed, folds)
    alone = [
        measure(f"fold-{fold}", some(packed, (folds == fold).nonzero().flatten().tolist()), None) for fold in (0, 1)
    ]
    assert (whole.tokens, folded.tokens) == ((), (24, 36))
    for layer in (0, 3):
        for linear in ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj"):
            one, other = (folded.read_folds(layer, linear, shares) for shares in ((1, 0), (0, 1)))
            assert torch.allclose(one.inputs, alone[0].read(layer, linear).inputs, atol=1e-5, rtol=1e-4)
            assert torch.allclose(other.inputs, alone[1].read(layer, linear).inputs, atol=1e-5, rtol=1e-4)
            assert not torch.allclose(one.inputs, other.inputs, rtol=0.1)
            mixed = folded.read_folds(layer, linear, (3, 1)).inputs
            assert torch.allclose(mixed, 0.75 * one.inputs + 0.25 * other.inputs, atol=1e-6)
            for both, part in zip(folded.read(layer, linear), whole.read(layer, linear), strict=True):
                assert (both is None) == (part is None)
                assert both is None or part is None or torch.allclose(both, part, atol=1e-5, rtol=1e-3)
    pairs = list(leave_one_out(folded, 1, "q_proj"))
    assert len(pairs) == 2
    assert torch.equal(pairs[0][0].inputs, pairs[1][1].inputs)


def test_a_store_shrinks_by_layer_and_linear(make_source, open_source, tmp_path):
    opened, store = open_source(make_source("llama")), MomentStore(tmp_path)
    measure_moments(opened.layers, sequences(3, 90), store, tmp_path, with_gradients=True)
    plain = store.read(1, "q_proj")
    store.shrinkage = Shrinkage(0.2, {(1, "q_proj"): 0.6})
    found = store.read(1, "q_proj")
    assert torch.equal(found.inputs, shrunk(plain.inputs, 0.6))
    assert found.outputs is not None
    assert plain.outputs is not None
    assert torch.equal(found.outputs, shrunk(plain.outputs, 0.6))
    # Keys share the moment of queries, but not their strength.
    assert torch.equal(store.read(1, "k_proj").inputs, shrunk(plain.inputs, 0.2))
    assert torch.equal(store.read_folds(1, "q_proj").inputs, plain.inputs)


def choose(tokens: int, other: Tensor | None = None) -> float:
    """The strength for two halves of a text of some tokens; `other` replaces the second half."""
    one = Moments(moment(draw(tokens, 1)))
    two = Moments(moment(draw(tokens, 2) if other is None else other))
    errors = cross_check(fit_low_rank(matrix(), 4), [(one, two), (two, one)], STRENGTHS)
    return STRENGTHS[errors.index(min(errors))]


def test_little_text_shrinks_and_much_text_does_not():
    assert choose(4) > 0
    assert choose(20_000) == 0


def test_halves_of_different_kinds_shrink_more_than_equal_ones():
    other = draw(20_000, 2) @ torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(9))).Q
    assert choose(20_000, other) > choose(20_000)


def text_of(kinds: tuple[int, ...], rows: int) -> CalibrationText:
    return CalibrationText(None, sequences(rows, 90), kinds)


def test_folds_are_kinds_or_halves():
    assert number_folds(text_of((), 5)).tolist() == [0, 1, 0, 1, 0]
    assert number_folds(text_of((2, 2, 2), 3)).tolist() == [0, 1, 0]
    assert number_folds(text_of((1, 0, 1, 1), 4)).tolist() == [0, 1, 0, 0]
    # The fifth kind shares the fold of the first.
    assert number_folds(text_of((0, 1, 2, 3, 4, 0), 6)).tolist() == [0, 1, 2, 3, 0, 0]
    with pytest.raises(
        DataError, match=r"calibration\.shrink: at least two sequences of 12 tokens .* \(got 1\); raise"
    ):
        number_folds(text_of((), 1))


def test_moments_of_one_fold_cannot_be_cross_checked(make_source, open_source, tmp_path):
    opened, store = open_source(make_source("llama")), MomentStore(tmp_path)
    measure_moments(opened.layers, sequences(3, 90), store, tmp_path, with_gradients=False)
    store.sign({}, 36, "text")
    store.check({}, with_gradients=False)
    with pytest.raises(SourceError, match=r"moments of two folds of the text are required .* \(got one\); give --cal"):
        store.check({}, with_gradients=False, with_folds=True)


def test_rounding_shrinks_from_feedback_to_the_nearest_integers(monkeypatch: pytest.MonkeyPatch):
    scheme, weight = SCHEMES["int4"], matrix(80, 64)
    sums = torch.stack([draw(30, seed, 64).T @ draw(30, seed, 64) for seed in (1, 2)])
    whole = sums.sum(dim=0)
    assert torch.equal(
        round_shrunk(weight, sums, scheme, 0.0).integers, round_with_feedback(weight, whole, scheme).integers
    )
    # At 1 nothing of the text is left. Eight bits are then rounded to the nearest; fewer have fitted scales besides.
    wide, blind = SCHEMES["int8"], round_with_feedback(weight, torch.eye(64), scheme)
    nearest = [round_weight(weight, each, torch.ones(64)) for each in (wide, scheme)]
    assert torch.equal(round_shrunk(weight, whole, wide, 1.0).integers, nearest[0].integers)
    assert not torch.equal(round_shrunk(weight, whole, wide, 0.0).integers, nearest[0].integers)
    assert torch.equal(round_shrunk(weight, whole, scheme, 1.0).integers, blind.integers)
    assert not torch.equal(round_shrunk(weight, whole, scheme, 0.0).integers, blind.integers)
    assert (blind.dequantise() - weight).norm() <= (nearest[1].dequantise() - weight).norm()
    chosen = round_shrunk(weight, sums, scheme, None).integers
    each = [round_shrunk(weight, whole, scheme, strength).integers for strength in STRENGTHS]
    assert sum(torch.equal(chosen, other) for other in each) == 1
    # The choice is the one of least error on the half left out, for the same outputs.
    rows = weight[::2]
    errors = []
    for strength in STRENGTHS:
        lost = 0.0
        for one, other in ((0, 1), (1, 0)):
            change = round_with_feedback(rows, shrunk(sums[one], strength), scheme).dequantise() - rows
            lost += float((draw(30, other + 1, 64) @ change.T).square().sum())
        errors.append(lost)
    assert torch.equal(chosen, each[errors.index(min(errors))])
    monkeypatch.setattr(shrinkage, "STRENGTHS", (0.3,))
    assert torch.equal(round_shrunk(weight, sums, scheme, None).integers, each[STRENGTHS.index(0.3)])
