"""Calibration text: sequences drawn from all over a text, some for fits and others for measurements."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refold.data.mixture import Interleave, MixedSource
from refold.data.packing import PackedSequence, PackedSequences, stack
from refold.data.readers import DataSource
from refold.data.tokens import TokenisedDocuments, require_known_tokens, tokenise
from refold.errors import DataError
from refold.families.arch import ArchSpec

READ_AHEAD = 32
"""Ratio of tokenised tokens to drawn tokens; sequences are drawn from all over them, because neighbours are alike."""
HELD_OUT_SHARE = 0.2
"""Share of the tokens, at the end, that held-out sequences are drawn from."""


class CalibrationText(NamedTuple):
    """Packed text for fits, None without a fit, and other text for measurements.

    Attributes:
        fit: Sequences for fits.
        held_out: Sequences for measurements.
        kinds: For each sequence of `held_out` the part of a mixture with weights that it is from; empty: one part.
    """

    fit: PackedSequence | None
    held_out: PackedSequence
    kinds: tuple[int, ...] = ()


def draw_streams(arch: ArchSpec, rows: int, tokens: int, seed: int) -> Float[Tensor, "B T D"]:
    """Draws a standard normal residual stream; a layer's input norm brings it to the usual scale."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, arch.hidden_size, generator=generator)


def pack_calibration(
    data: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    num_fit: int,
    num_held_out: int,
    seed: int = 0,
    vocab_size: int | None = None,
) -> CalibrationText:
    """Packs calibration text; positions mark the documents.

    Each part of a mixture with weights gives its share of the sequences, rounded to whole sequences.

    Args:
        data: The text. Its documents are read in a random order until there are enough tokens.
        tokenizer: Tokenizer of the source.
        sequence_length: T, tokens of each sequence.
        num_fit: Sequences for fits; fewer if the text is short. With 0 all of the text is held out.
        num_held_out: Sequences for measurements; fewer if the text is short.
        seed: Seed of the choice of sequences.
        vocab_size: Number of tokens in the source's vocabulary, to check; None: no check.

    Raises:
        DataError: The text is shorter than two sequences, a part of a mixture is shorter than its share, or a token is
            not in the source's vocabulary.
    """
    if isinstance(data, MixedSource) and data.weights is not None:
        pack = partial(
            pack_calibration, tokenizer=tokenizer, sequence_length=sequence_length, seed=seed, vocab_size=vocab_size
        )
        return _pack_mixture(data, Interleave(data.weights), num_fit, num_held_out, pack)
    wanted = num_fit + num_held_out
    tokens = tokenise(data, tokenizer, budget=READ_AHEAD * wanted * sequence_length, seed=seed)
    require_known_tokens(f"calibration: {data.name}", tokens.tokens, vocab_size)
    total = tokens.num_tokens // sequence_length
    if total < 2:
        raise DataError(
            f"calibration: at least {2 * sequence_length} tokens of text are required (got {tokens.num_tokens} in "
            f"{data.name}); give more of it"
        )
    if not num_fit:
        return CalibrationText(None, _draw(tokens, 0, total, sequence_length, num_held_out, seed))
    split = total - max(1, round(total * HELD_OUT_SHARE), num_held_out if total >= wanted else 0)
    return CalibrationText(
        fit=_draw(tokens, 0, split, sequence_length, num_fit, seed),
        held_out=_draw(tokens, split, total, sequence_length, num_held_out, seed),
    )


def _pack_mixture(
    data: MixedSource,
    interleave: Interleave,
    num_fit: int,
    num_held_out: int,
    pack: Callable[..., CalibrationText],
) -> CalibrationText:
    """Packs each part by itself and puts its sequences at the places that the interleaving gives to the part."""
    counts = [
        (interleave.among(part, num_fit), interleave.among(part, num_held_out)) for part in range(len(data.parts))
    ]
    packed: list[CalibrationText | None] = []
    for part, (fit, held_out) in zip(data.parts, counts, strict=True):
        if not fit and not held_out:
            packed.append(None)
            continue
        found = pack(part, num_fit=fit, num_held_out=held_out or 1)
        got = (0 if found.fit is None else len(found.fit.input_ids)), len(found.held_out.input_ids)
        if got[0] < fit or got[1] < held_out:
            length = found.held_out.input_ids.shape[1]
            raise DataError(
                f"calibration: {fit + held_out} sequences of {length} tokens are required of {part.name} for "
                f"its share (got {sum(got)}); give more of it, a smaller weight, or lower calibration.tokens"
            )
        packed.append(found)
    fits = [None if each is None else each.fit for each in packed]
    return CalibrationText(
        fit=_deal(fits, interleave, num_fit) if num_fit else None,
        held_out=_deal([None if each is None else each.held_out for each in packed], interleave, num_held_out),
        kinds=tuple(interleave.locate(place)[0] for place in range(num_held_out)),
    )


def _deal(parts: Sequence[PackedSequence | None], interleave: Interleave, count: int) -> PackedSequence:
    rows = []
    for place in range(count):
        number, row = interleave.locate(place)
        part = parts[number]
        assert part is not None
        rows.append(PackedSequence(*(column[row] for column in part)))
    return stack(rows)


def _draw(
    tokens: TokenisedDocuments, first: int, last: int, sequence_length: int, count: int, seed: int
) -> PackedSequence:
    """Draws from the sequences `first..last` of the tokens."""
    start, stop = first * sequence_length, last * sequence_length
    inside = tokens.offsets[(tokens.offsets > start) & (tokens.offsets < stop)] - start
    offsets = np.concatenate(([0], inside, [stop - start]))
    packed = PackedSequences(tokens.tokens[start:stop], offsets, sequence_length, seed)
    return stack([packed.sequence(place) for place in range(min(count, len(packed)))])
