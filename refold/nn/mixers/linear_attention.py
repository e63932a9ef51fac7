"""Attention by feature maps instead of a softmax (arXiv 2006.16236), with a window of softmax beside it if asked."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from refold.families.arch import ArchSpec
from refold.mixers.linear_attention import LinearAttention
from refold.mixers.spec import MixerSpec
from refold.nn.mixers.attention import AttentionMixer
from refold.nn.mixers.batch import DepthInputs
from refold.nn.mixers.memory import StateView
from refold.nn.mixers.recurrent import StateMixer
from refold.nn.part import Lora, OwnVectors
from refold.ops import scalar_decay
from refold.ops.choice import run
from refold.ops.chunking import cut
from refold.ops.documents import number_documents
from refold.ops.feature_maps import feature_map
from refold.ops.window import window_sums

TOKENS_AT_ONCE = 2048
"""Tokens of a row that go from features to outputs together: large blocks of memory take longer to allocate than to
fill."""
SMALLEST_SUM = 1e-30
"""Lower bound of the sum of weights, a divisor: sums of a long key's random features are far below 1, yet exact."""


@dataclass(frozen=True)
class ScaledReads:
    """Queries, keys and values of one call; queries and keys carry the root of the attention's scale.

    Attributes:
        dtype: Of the hidden states.
        query: `[B, T, H, K]`.
        key: `[B, T, G, K]`.
        value: `[B, T, G, K]`.
        before: `[B, W, 2 G K + 1]`: keys, values and a one of each of the W tokens before this call, all zero where
            there were none; None without a window.
    """

    dtype: torch.dtype
    query: Tensor
    key: Tensor
    value: Tensor
    before: Tensor | None


class LinearAttentionMixer(StateMixer, AttentionMixer):
    """Attention's weights with a feature map for queries and one for keys."""

    @classmethod
    def view(cls, config: PreTrainedConfig, arch: ArchSpec, layer_idx: int, window: int | None) -> nn.Module:
        return StateView(layer_idx)

    def __init__(self, arch: ArchSpec, spec: MixerSpec, stores_vectors: bool):
        super().__init__(arch, spec, stores_vectors)
        assert isinstance(spec, LinearAttention)
        self.groups = arch.num_attention_heads // arch.num_key_value_heads
        self.feature_map, self.window, self.normalise_weights = spec.feature_map, spec.window, spec.normalise
        self.has_directions = spec.map_shape(arch) is not None
        self.has_weights = "map_weights.log" in spec.vectors(arch)
        self.root_scale = arch.attention_scale**0.5
        if self.window:
            self.branches = ("window", "features")

    def read_inputs(
        self, hidden_states: Float[Tensor, "B T D"], inputs: DepthInputs, lora: Lora, vectors: OwnVectors
    ) -> ScaledReads:
        query, key, value = self._read_scaled(hidden_states, inputs, lora, vectors)
        before = None
        if self.window:
            # The last channel is one at tokens and zero where `exchange` returns zeros instead of a token.
            kept = torch.cat((key.flatten(2), value.flatten(2), torch.ones_like(key[..., :1, 0])), dim=-1)
            before = inputs.memory.exchange(kept, self.window, inputs.resets)
            if before is None:
                before = torch.zeros_like(kept[:, :1]).expand(-1, self.window, -1)
        return ScaledReads(hidden_states.dtype, query, key, value, before)

    def mix(
        self, reads: ScaledReads, state: Tensor | None, resets: Tensor | None, lora: Lora, vectors: OwnVectors
    ) -> tuple[Float[Tensor, "B T H V"], Tensor]:
        run_over = self._mix_alone if reads.before is None else self._mix_with_window
        return run_over(reads, state, resets, vectors)

    def finish(self, reads: ScaledReads, mixed: Tensor, lora: Lora, vectors: OwnVectors) -> Float[Tensor, "B T W"]:
        return mixed.to(reads.dtype).flatten(-2)

    def features(self, x: Float[Tensor, "B T H K"], name: str, vectors: OwnVectors) -> Float[Tensor, "B T H F"]:
        """Maps queries (`q_map`) or keys (`k_map`)."""
        directions = self.vector(f"{name}.weight", vectors) if self.has_directions else None
        weights = self.vector("map_weights.log", vectors) / 2 if self.has_weights else None
        # Without a normaliser, scaling a query's features would change the output.
        is_query = name == "q_map" and self.normalise_weights and not self.window
        return feature_map(self.feature_map, x, directions, weights, is_query)

    def matrix(
        self, hidden_states: Tensor, view: nn.Module, inputs: DepthInputs, lora: Lora, vectors: OwnVectors
    ) -> Float[Tensor, "B H T T"]:
        query, key, _ = self._read_scaled(hidden_states, inputs, lora, vectors)
        return self.mixing_matrix(query, self._widen(key), inputs.resets, vectors)

    def mixing_matrix(
        self,
        query: Float[Tensor, "B T H K"],
        key: Float[Tensor, "B T H K"],
        resets: Bool[Tensor, "B T"] | None,
        vectors: OwnVectors = None,
    ) -> Float[Tensor, "B H T T"]:
        """Returns the matrix that mixes values, from queries and keys that carry the attention's scale."""
        batch, tokens = query.shape[:2]
        numbers = number_documents(resets, batch, tokens, query.device)
        place = torch.arange(tokens, device=query.device)
        seen = (numbers[:, :, None] == numbers[:, None, :]) & (place[None, :] <= place[:, None])
        near = seen & (place[None, :] > place[:, None] - self.window)
        mapped = torch.einsum(
            "bthf,bshf->bhts", self.features(query, "q_map", vectors), self.features(key, "k_map", vectors)
        )
        weights = mapped * (seen & ~near)[:, None] if self.window else mapped * seen[:, None]
        if self.window:
            scores = torch.einsum("bthk,bshk->bhts", query.float(), key.float())
            scores = scores.masked_fill(~near[:, None], -torch.inf)
            share = self._share(vectors).view(1, -1, 1, 1)
            weights = (1 - share) * weights + share * (scores - scores.amax(dim=-1, keepdim=True).detach()).exp()
        return (
            weights / weights.sum(dim=-1, keepdim=True).clamp(min=SMALLEST_SUM) if self.normalise_weights else weights
        )

    def _read_scaled(
        self, hidden_states: Tensor, inputs: DepthInputs, lora: Lora, vectors: OwnVectors
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.read(hidden_states, inputs.rotation, lora, vectors)
        return query * self.root_scale, key * self.root_scale, value

    def _widen(self, states: Float[Tensor, "B T G K"]) -> Float[Tensor, "B T H K"]:
        return states if self.groups == 1 else states.repeat_interleave(self.groups, dim=2)

    def _mix_alone(
        self, reads: ScaledReads, state: Tensor | None, resets: Tensor | None, vectors: OwnVectors
    ) -> tuple[Float[Tensor, "B T H V"], Tensor]:
        query, key, value = reads.query, reads.key, reads.value
        pieces: list[Tensor] = []
        for rows in cut(query.shape[1], TOKENS_AT_ONCE):
            mapped = (
                self.features(query[:, rows], "q_map", vectors),
                self.features(self._widen(key[:, rows]), "k_map", vectors),
            )
            mixed, state = self._mix_features(*mapped, self._widen(value[:, rows]), state, _of(resets, rows))
            if self.normalise_weights:
                mixed = mixed[..., :-1] / mixed[..., -1:].clamp(min=SMALLEST_SUM)
            pieces.append(mixed)
        assert state is not None
        return _join(pieces), state

    def _mix_features(
        self, query: Tensor, key: Tensor, value: Tensor, state: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Runs the recurrence over features; with a normaliser the last channel is the sum of weights."""
        value = value.float()
        if self.normalise_weights:
            value = torch.cat((value, torch.ones_like(value[..., :1])), dim=-1)
        return run(scalar_decay, query, key, value, None, state=state, resets=resets)

    def _mix_with_window(
        self, reads: ScaledReads, state: Tensor | None, resets: Tensor | None, vectors: OwnVectors
    ) -> tuple[Float[Tensor, "B T H V"], Tensor]:
        query, key, value, before = reads.query, reads.key, reads.value, reads.before
        assert before is not None
        batch, tokens = query.shape[:2]
        numbers = number_documents(resets, batch, tokens, query.device)
        width = key.flatten(2).shape[2]
        past_key, past_value, is_real = before.split([width, width, 1], dim=-1)
        keys, values = (
            self._widen(torch.cat((past.unflatten(-1, (-1, self.head_dim)), states), dim=1))
            for past, states in ((past_key, key), (past_value, value))
        )
        # Slots without a token of the document that continues get the number -1, which no token has.
        past_numbers = torch.where(is_real.squeeze(-1) > 0, 0, -1)
        all_numbers = torch.cat((past_numbers, numbers), dim=1)
        # A copy, because an exported graph would compare the strides of a view with those of `numbers`.
        near_numbers = all_numbers[:, 1:].unfold(1, self.window, 1).contiguous()
        seen = near_numbers == numbers.unsqueeze(-1)
        share = self._share(vectors).view(1, 1, -1, 1)
        pieces: list[Tensor] = []
        for rows in cut(tokens, TOKENS_AT_ONCE):
            reach = slice(rows.start, rows.stop + self.window)
            near, near_sum = window_sums(query[:, rows], keys[:, reach], values[:, reach], seen[:, rows], self.window)
            # The features see the token that leaves the window: keys and values `window` tokens late.
            is_late = (all_numbers[:, rows] == numbers[:, rows])[:, :, None, None]
            late = self.features(keys[:, rows], "k_map", vectors) * is_late
            far, state = self._mix_features(
                self.features(query[:, rows], "q_map", vectors), late, values[:, rows], state, _of(resets, rows)
            )
            summed = share * near + (1 - share) * far[..., :-1]
            weight = share * near_sum + (1 - share) * far[..., -1:]
            pieces.append(summed / weight.clamp(min=SMALLEST_SUM))
        assert state is not None
        return _join(pieces), state

    def _share(self, vectors: OwnVectors) -> Tensor:
        share = self.vector("blend.share", vectors).float().sigmoid()
        if self.dropped_branch is None:
            return share
        return torch.full_like(share, 0.0 if self.dropped_branch == "window" else 1.0)


def _of(resets: Tensor | None, rows: slice) -> Tensor | None:
    return None if resets is None else resets[:, rows]


def _join(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
