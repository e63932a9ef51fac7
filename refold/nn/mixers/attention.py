"""Softmax attention through transformers' registry of attention back-ends."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from refold.families.arch import ArchSpec
from refold.mixers.spec import MixerSpec
from refold.nn.mixers.batch import DepthInputs
from refold.nn.mixers.key_values import KeyValue
from refold.nn.mixers.mixer import Mixer
from refold.nn.mixers.prefix import put_before
from refold.nn.mixers.store import Appended
from refold.nn.part import Lora, OwnVectors
from refold.nn.rotary import Rotation, rotate, rotate_at_once


def eager_attention(
    module: "AttentionView",
    query: Float[Tensor, "B H T K"],
    key: Float[Tensor, "B G S K"],
    value: Float[Tensor, "B G S K"],
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B H T S"]]:
    """Plain attention that materialises its scores: softmax(scaling Q K^T + mask) V, soft-capped where asked."""
    groups = module.num_key_value_groups
    key, value = (states.repeat_interleave(groups, dim=1) if groups > 1 else states for states in (key, value))
    weights = attention_weights(query, key, attention_mask, scaling, softcap)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def attention_weights(
    query: Float[Tensor, "B H T K"],
    key: Float[Tensor, "B H S K"],
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> Float[Tensor, "B H T S"]:
    """Softmax of the masked, possibly soft-capped scores, taken in float32; the mask is added to the scores."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    return nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)


class AttentionView(nn.Module):
    """One depth's attention as back-ends and paged caches see it: no weights, its own `layer_idx`, window and scale."""

    def __init__(self, config: PreTrainedConfig, arch: ArchSpec, layer_idx: int, window: int | None):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = arch.head_dim
        self.num_key_value_groups = arch.num_attention_heads // arch.num_key_value_heads
        self.scaling = arch.attention_scale
        self.sliding_window = window
        self.softcap = arch.attention_softcap
        self.is_causal = True

    def forward(
        self,
        query: Float[Tensor, "B H T K"],
        key: Float[Tensor, "B G S K"],
        value: Float[Tensor, "B G S K"],
        inputs: DepthInputs,
        prefix: KeyValue | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends to keys and values, those of earlier calls included, and to a prefix `[1, G, P, K]`.

        Returns:
            The heads in the back-end's shape (`[B, T, H, K]`, or `[B T, H K]` of engines), and weights or None.
        """
        mask, num_tokens = inputs.attention_mask, key.shape[2]
        if prefix is not None:
            key, value, mask = put_before(prefix, query, key, value, mask, self.sliding_window)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "eager", eager_attention)
        capped = {} if self.softcap is None else {"softcap": self.softcap}
        windowed = {} if self.sliding_window is None else {"sliding_window": self.sliding_window}
        heads, weights = attend(
            self, query, key, value, mask, dropout=0.0, scaling=self.scaling, **capped, **windowed, **inputs.extra
        )
        return heads, weights if weights is None or prefix is None else weights[..., -num_tokens:]

    def extra_repr(self) -> str:
        return f"layer_idx={self.layer_idx}, window={self.sliding_window}"


class AttentionMixer(Mixer):
    """Attention weights with their norms, run by one or more depths (arXiv 1706.03762; grouped queries: 2305.13245)."""

    @classmethod
    def create(cls, arch: ArchSpec, spec: MixerSpec, stores_vectors: bool) -> "AttentionMixer":
        return cls(arch, spec, stores_vectors)

    @classmethod
    def view(cls, config: PreTrainedConfig, arch: ArchSpec, layer_idx: int, window: int | None) -> AttentionView:
        return AttentionView(config, arch, layer_idx, window)

    input_groups = (("q_proj", "k_proj", "v_proj"),)

    def __init__(self, arch: ArchSpec, spec: MixerSpec, stores_vectors: bool):
        super().__init__(spec.linears(arch), spec.vectors(arch), arch.norm, stores_vectors, spec.fills(arch))
        self.head_dim, self.qk_norm = arch.head_dim, arch.qk_norm
        self.num_matrix_heads = arch.num_attention_heads
        self.num_heads = [arch.num_attention_heads, arch.num_key_value_heads]

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        view: nn.Module,
        inputs: DepthInputs,
        lora: Lora,
        vectors: OwnVectors,
    ) -> tuple[Float[Tensor, "B T D"], KeyValue | None]:
        assert isinstance(view, AttentionView)
        shared, made = inputs.shared, None
        if shared is not None and not shared.heads.made:
            query = self.read_query(hidden_states, inputs.rotation, lora, vectors)
        else:
            query, key, value = self.read(hidden_states, inputs.rotation, lora, vectors)
            key, value, extra = self._append(key, value, inputs)
            made = key, value
            if extra is not inputs.extra:
                inputs = inputs._replace(extra=extra)
        prefix = None
        if (given := inputs.prefix) is not None:
            prefix = inputs.memory.once(lambda: self.read_prefix(given, lora, vectors))
        if inputs.memory.attends:
            heads = inputs.memory.attend(view, query.transpose(1, 2))
        else:
            attended = made if shared is None else shared.heads.look_at(made, shared.read)
            assert attended is not None
            heads, _ = view(query.transpose(1, 2), *attended, inputs, prefix)
        # Engines return `[tokens, heads x size]`.
        return self.write(heads.reshape(*query.shape[:2], -1), lora, vectors), made

    def fill(self, hidden_states: Float[Tensor, "B T D"], inputs: DepthInputs, lora: Lora, vectors: OwnVectors) -> None:
        if inputs.shared is None or inputs.shared.heads.made:
            x = self.normalise("input_norm", hidden_states, vectors)
            key, value = self.project_all(("k_proj", "v_proj"), x, lora, vectors)
            key = self._finish("k", key, inputs.rotation, vectors)
            self._append(key, value.unflatten(-1, (-1, self.head_dim)), inputs)

    def _append(self, key: Tensor, value: Tensor, inputs: DepthInputs) -> Appended:
        """Appends those of the heads `[B, T, G, K]` that the depth makes."""
        shared = inputs.shared
        if shared is not None and not shared.heads.makes_all:
            key, value = (states[:, :, list(shared.heads.made)] for states in (key, value))
        return inputs.memory.append(key.transpose(1, 2), value.transpose(1, 2), inputs.extra)

    def matrix(
        self,
        hidden_states: Float[Tensor, "B T D"],
        view: nn.Module,
        inputs: DepthInputs,
        lora: Lora,
        vectors: OwnVectors,
    ) -> Float[Tensor, "B H T T"]:
        assert isinstance(view, AttentionView)
        query, key, _ = self.read(hidden_states, inputs.rotation, lora, vectors)
        key = key.repeat_interleave(view.num_key_value_groups, dim=2)
        seen = _seen(hidden_states, view.sliding_window, inputs.document_starts)
        mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
        mask.masked_fill_(~seen, torch.finfo(query.dtype).min)
        return attention_weights(query.transpose(1, 2), key.transpose(1, 2), mask, view.scaling, view.softcap)

    def read(
        self, hidden_states: Tensor, rotation: Rotation | None, lora: Lora, vectors: OwnVectors
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values `[B, T, H, K]`, normed and rotated."""
        x = self.normalise("input_norm", hidden_states, vectors)
        names = ("q_proj", "k_proj", "v_proj")
        if self.packed is not None and self.qk_norm == "none":
            # Queries and keys lie side by side and are rotated together.
            heads = self.packed.project(names, x, lora, vectors).view(*x.shape[:-1], -1, self.head_dim)
            turned, value = heads.split_with_sizes([self.num_heads[0] + self.num_heads[1], self.num_heads[1]], 2)
            turned = turned if rotation is None else rotate_at_once(turned, rotation)
            query, key = turned.split_with_sizes(self.num_heads, 2)
            return query, key, value
        query, key, value = self.project_all(names, x, lora, vectors)
        heads = (self._finish("q", query, rotation, vectors), self._finish("k", key, rotation, vectors))
        return *heads, value.unflatten(-1, (-1, self.head_dim))

    def read_query(
        self, hidden_states: Tensor, rotation: Rotation | None, lora: Lora, vectors: OwnVectors
    ) -> Float[Tensor, "B T H K"]:
        """Returns queries, normed and rotated, at a depth that makes no keys and values."""
        x = self.normalise("input_norm", hidden_states, vectors)
        return self._finish("q", self.project("q_proj", x, lora, vectors), rotation, vectors)

    def read_prefix(self, prefix: Float[Tensor, "P D"], lora: Lora, vectors: OwnVectors) -> KeyValue:
        """Returns keys and values `[1, G, P, K]` of a prefix, projected without input norm and not rotated."""
        key, value = self._key_value(prefix.unsqueeze(0), None, lora, vectors)
        return key.transpose(1, 2), value.transpose(1, 2)

    def _key_value(
        self, x: Tensor, rotation: Rotation | None, lora: Lora, vectors: OwnVectors
    ) -> tuple[Float[Tensor, "B T G K"], Float[Tensor, "B T G K"]]:
        key, value = self.project_all(("k_proj", "v_proj"), x, lora, vectors)
        return self._finish("k", key, rotation, vectors), value.unflatten(-1, (-1, self.head_dim))

    def _finish(
        self, name: str, states: Float[Tensor, "B T W"], rotation: Rotation | None, vectors: OwnVectors
    ) -> Float[Tensor, "B T H K"]:
        """Norms and rotates projected queries (`q`) or keys (`k`)."""
        if self.qk_norm == "full":
            states = self.normalise(f"{name}_norm", states, vectors)
        states = states.unflatten(-1, (-1, self.head_dim))
        if self.qk_norm == "head":
            states = self.normalise(f"{name}_norm", states, vectors)
        return states if rotation is None else rotate(states, rotation)

    def write(self, heads: Tensor, lora: Lora, vectors: OwnVectors) -> Tensor:
        """Output projection and, where there is one, output norm."""
        return self.normalise("output_norm", self.project("o_proj", heads, lora, vectors), vectors)

    def compile_regions(self) -> None:
        self.read = torch.compile(self.read)
        self.read_query = torch.compile(self.read_query)
        self.write = torch.compile(self.write)


def _seen(hidden_states: Tensor, window: int | None, document_starts: Tensor | None) -> Bool[Tensor, "B 1 T T"]:
    """Returns the mask of tokens (last axis) that each token may attend to: causal, in its document and window."""
    tokens = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    query, key = tokens[:, None], tokens[None, :]
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    seen = seen.expand(len(hidden_states), 1, *seen.shape)
    return seen if document_starts is None else seen & (key >= document_starts[:, None, :, None])
