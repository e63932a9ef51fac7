"""The description of one model family: its config fields and its tensor names, for reading and for writing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from refold.families.arch import ArchSpec

Layout = Literal["whole", "rows", "heads"]
"""Layout of the canonical pieces in a source tensor. `whole`: one piece; `rows`: pieces concatenated by rows; `heads`:
for each head the `head_dim` rows of every piece in turn (GPT-NeoX: `[heads, pieces, head_dim]`)."""


@dataclass(frozen=True)
class TensorRule:
    """One source tensor and the canonical pieces inside it.

    Canonical names: `embed_tokens.weight`, `norm.weight`, `lm_head.weight`, and in a layer `mixer.q_proj.weight`,
    `mixer.input_norm.weight`, `mlp.up_proj.bias`, ... A source name with `{layer}` stands for one tensor per layer.
    """

    source: str
    pieces: tuple[str, ...]
    layout: Layout = "whole"

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.source


@dataclass(frozen=True)
class Family:
    """A model family: one file and one entry in the registry."""

    model_type: str
    architecture: str
    """Class name in transformers."""
    url: str
    read_config: Callable[[Mapping[str, Any]], ArchSpec]
    """Converts a raw `config.json` (of transformers 4 or 5) to an ArchSpec, with the family's own defaults."""
    write_config: Callable[[ArchSpec], dict[str, Any]]
    """Converts an ArchSpec to the fields of a transformers 5 `config.json`: the inverse of `read_config`."""
    rules: tuple[TensorRule, ...]
    """All tensors that the family can have. A checkpoint needs only those that its ArchSpec uses (biases and an untied
    head are optional)."""
    spellings: tuple[tuple[TensorRule, ...], ...] = ()
    """The same rules with other tensor names, for families whose checkpoints use several naming schemes. `rules` has
    the names of transformers' modules."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Glob patterns of source tensors that are ignored, each with the reason."""
