"""Bias and penalties of all rows: changes of logits before the choice of a token."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from refold.engine.buffer import Buffer
from refold.generation.sampling import Sampling


class TokenLists:
    """A short list of tokens for each row, each token with a number.

    Args:
        max_rows: Number of rows.

    Attributes:
        ids: Token ids, padded with -1, `[max_rows, capacity]`.
        numbers: The number of each token, likewise.
        lengths: Number of tokens of each row.
    """

    def __init__(self, max_rows: int):
        self.ids = np.full((max_rows, 0), -1, dtype=np.int64)
        self.numbers = np.zeros((max_rows, 0), dtype=np.float32)
        self.lengths = np.zeros(max_rows, dtype=np.int64)
        self._places: dict[int, dict[int, int]] = {}

    def set(self, row: int, numbers: Mapping[int, float]) -> None:
        """Gives a row its tokens."""
        self.clear(row)
        self._reserve(len(numbers))
        self.ids[row, : len(numbers)] = list(numbers)
        self.numbers[row, : len(numbers)] = list(numbers.values())
        self.lengths[row] = len(numbers)
        self._places[row] = {token: place for place, token in enumerate(numbers)}

    def clear(self, row: int) -> None:
        """Empties the list of a row."""
        if self._places.pop(row, None) is not None:
            self.ids[row], self.lengths[row] = -1, 0

    def add(self, row: int, token: int) -> None:
        """Adds one to the number of a token, if the row has a list."""
        places = self._places.get(row)
        if places is None:
            return
        place = places.get(token)
        if place is None:
            place = places[token] = len(places)
            self._reserve(len(places))
            self.ids[row, place], self.numbers[row, place] = token, 0
            self.lengths[row] = len(places)
        self.numbers[row, place] += 1

    def has_list(self, rows: Int64[np.ndarray, " R"]) -> np.ndarray:
        """Returns the indices of the rows with a list."""
        return np.flatnonzero(self.lengths[rows] > 0)

    def _reserve(self, length: int) -> None:
        short = length - self.ids.shape[1]
        if short > 0:
            more = ((0, 0), (0, max(short, self.ids.shape[1])))
            self.ids = np.pad(self.ids, more, constant_values=-1)
            self.numbers = np.pad(self.numbers, more)


class LogitChanges:
    """Bias and penalties of the running choices.

    Args:
        max_rows: Most choices at a time.
        device: Device of the logits.
    """

    def __init__(self, max_rows: int, device: torch.device):
        self._device, self._buffer = device, Buffer(device)
        self._bias, self._counts = TokenLists(max_rows), TokenLists(max_rows)
        # Repetition, frequency and presence penalty.
        self._penalties = np.zeros((max_rows, 3), dtype=np.float32)

    def set(self, row: int, sampling: Sampling, prompt_ids: Sequence[int]) -> None:
        """Gives a row the bias and penalties of a choice; tokens of the prompt count for the repetition penalty."""
        self.clear(row)
        if sampling.logit_bias:
            self._bias.set(row, sampling.biases)
        if sampling.has_penalties:
            self._penalties[row] = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
            self._counts.set(row, dict.fromkeys(prompt_ids, 0.0))

    def clear(self, row: int) -> None:
        """Empties the lists of a row."""
        self._bias.clear(row)
        self._counts.clear(row)

    def note(self, row: int, token: int) -> None:
        """Counts a new token, if the row has penalties."""
        self._counts.add(row, token)

    def apply(
        self,
        logits: Float[Tensor, "R N"],
        rows: Int64[np.ndarray, " R"],
        drafts: Int64[Tensor, "R E"] | None = None,
    ) -> Float[Tensor, "R N"]:
        """Returns float32 logits after bias and penalties: the given ones, or a buffer that the next call overwrites.

        Args:
            logits: Logits of the model.
            rows: Row of each; a row may occur several times.
            drafts: Tokens after the noted ones, padded with -1, that penalties count too.
        """
        biased, penalised = self._bias.has_list(rows), self._counts.has_list(rows)
        if logits.dtype == torch.float32 and not len(biased) and not len(penalised):
            return logits
        logits = self._buffer.take(*logits.shape).copy_(logits)
        if len(biased):
            at, ids, numbers = self._entries(self._bias, biased, rows)
            is_token = ids >= 0
            places = at[:, None].expand_as(ids)[is_token], ids[is_token]
            logits[places] += numbers[is_token]
        if len(penalised):
            self._penalise(logits, self._entries(self._counts, penalised, rows), rows[penalised], drafts)
        return logits

    def _penalise(
        self, logits: Tensor, entries: tuple[Tensor, Tensor, Tensor], rows: np.ndarray, drafts: Tensor | None
    ) -> None:
        at, ids, counts = entries
        if drafts is not None:
            drafts = drafts[at]
            # A drafted token may be in the list, or be drafted twice: its entries then have the same count.
            noted = ((drafts[:, :, None] == ids[:, None, :]) * counts[:, None, :]).sum(dim=-1)
            ids, counts = torch.cat((ids, drafts), dim=1), torch.cat((counts, noted), dim=1)
            counts = counts + (ids[:, :, None] == drafts[:, None, :]).sum(dim=-1)
        is_token = ids >= 0
        places = at[:, None].expand_as(ids)[is_token], ids[is_token]
        penalties = self._tensor(self._penalties[rows])[:, None].expand(*ids.shape, 3)[is_token]
        repetition, frequency, presence = penalties.unbind(dim=-1)
        found, counts = logits[places], counts[is_token]
        found = torch.where(found < 0, found * repetition, found / repetition)
        logits[places] = found - frequency * counts - presence * (counts > 0)

    def _entries(
        self, lists: TokenLists, chosen: np.ndarray, rows: np.ndarray
    ) -> tuple[Int64[Tensor, " M"], Int64[Tensor, "M U"], Float[Tensor, "M U"]]:
        """Returns the indices of rows with a list, and their lists as tensors."""
        rows = rows[chosen]
        longest = int(lists.lengths[rows].max())
        parts = (chosen, lists.ids[rows, :longest], lists.numbers[rows, :longest])
        return tuple(map(self._tensor, parts))  # pyright: ignore[reportReturnType]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
