"""How one family's checkpoints are read and written, as data: config fields and tensor names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from refold.families.arch import ArchSpec

Layout = Literal["whole", "rows", "heads"]
"""How a source tensor holds its pieces: one piece; pieces one after the other by rows; or, for each head, the pieces'
`head_dim` rows in turn (GPT-NeoX: `[heads, pieces, head_dim]`)."""


@dataclass(frozen=True)
class TensorRule:
    """One source tensor and the canonical pieces it holds.

    Canonical names: `embed_tokens.weight`, `norm.weight`, `lm_head.weight`, and in a layer `mixer.q_proj.weight`,
    `mixer.input_norm.weight`, `mlp.up_proj.bias`, ... A rule whose source name holds `{layer}` stands for one tensor
    per layer.
    """

    source: str
    pieces: tuple[str, ...]
    layout: Layout = "whole"

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.source


@dataclass(frozen=True)
class Family:
    """A source architecture: plug point of its own, one file each, one entry in the registry."""

    model_type: str
    architecture: str
    """Class name that transformers loads it with."""
    url: str
    read_config: Callable[[Mapping[str, Any]], ArchSpec]
    """Raw `config.json` (of transformers 4 or 5) to ArchSpec, with the family's own defaults."""
    write_config: Callable[[ArchSpec], dict[str, Any]]
    """ArchSpec to the fields of a transformers 5 `config.json`: the inverse of `read_config`."""
    rules: tuple[TensorRule, ...]
    """All tensors the family can have; those an ArchSpec has no use for (biases, an untied head) need not be there."""
    spellings: tuple[tuple[TensorRule, ...], ...] = ()
    """The same rules with other names, where checkpoints of more than one layout are about. `rules` has the names that
    transformers' modules have."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Glob patterns of source tensors that are left out, each with the reason."""
