"""Attention whose softmax is replaced by the product of feature maps, with a window of softmax beside it if asked."""

from collections.abc import Mapping
from typing import Literal

from refold.errors import RecipeError
from refold.families.arch import ArchSpec
from refold.fields import Count, LayerIndex
from refold.mixers.attention import attention_linears, attention_vectors, key_value_elements
from refold.mixers.spec import Carried, Fill, MixerSpec, Shape, SoftmaxFit

FEATURE_MAPS: Mapping[str, str] = {
    "elu": "https://arxiv.org/abs/2006.16236",
    "relu": "https://arxiv.org/abs/2103.13076",
    "t2r": "https://arxiv.org/abs/2103.13076",
    "hedgehog": "https://arxiv.org/abs/2402.04347",
    "favor": "https://arxiv.org/abs/2009.14794",
    "dijiang": "https://arxiv.org/abs/2403.19928",
}
"""The paper of each map."""
UNLEARNED = ("elu", "relu")
MAP_FILLS: Mapping[str, Fill] = {
    "t2r": Fill("identity", 1.0),
    "hedgehog": Fill("identity", 1.0),
    "favor": Fill("orthogonal"),
    "dijiang": Fill("cosine"),
}
"""The initial directions of each map that has some."""


class LinearAttention(MixerSpec):
    """Approximates softmax attention by phi(Q) phi(K)^T (arXiv 2006.16236)."""

    url = "https://arxiv.org/abs/2006.16236"
    is_recurrent = True
    transfers_all = True

    type: Literal["linear_attention"] = "linear_attention"
    feature_map: Literal["elu", "relu", "t2r", "hedgehog", "favor", "dijiang"] = "hedgehog"
    """phi: `elu` plus 1, `relu`; a learned linear with a relu (`t2r`) or with the softmax of its values and their
    negatives (`hedgehog`); positive random features (`favor`); weighted features of a cosine transform (`dijiang`)."""
    features: Count | None = None
    """Features of each head, the rank of the approximation; left out: as many as a head is large, `hedgehog` twice."""
    normalise: bool = True
    """Whether weights are divided by their sum, as the softmax is."""
    window: LayerIndex = 0
    """So many latest tokens, itself included, are attended to by softmax, all earlier ones by features, under one
    normaliser (LoLCATs, arXiv 2410.10254); 0: features only."""
    fit: SoftmaxFit = "none"
    """Inputs that learned maps are fitted on before healing: none, random ones (the source's attention is imitated),
    or the text given at conversion."""

    def resolve(self, arch: ArchSpec, where: str) -> "LinearAttention":
        """Fills in the number of features.

        Raises:
            RecipeError: Features that this map cannot have, or a fit of a map without weights.
        """
        name, size = self.feature_map, arch.head_dim
        features = self.features or (2 * size if name == "hedgehog" else size)
        if name in UNLEARNED and features != size:
            raise RecipeError(
                f"{where}.features: must be {size} for {name}, which maps each number of a head (got {features})"
            )
        if name == "hedgehog" and features % 2:
            raise RecipeError(
                f"{where}.features: must be even for hedgehog, which has each with its negative (got {features})"
            )
        if self.fit != "none" and name not in ("t2r", "hedgehog"):
            raise RecipeError(f"{where}.fit: requires a learned map, t2r or hedgehog (got {name}); leave fit out")
        if self.window and not self.normalise:
            raise RecipeError(f"{where}.normalise: must be true where a window is attended to by softmax (got false)")
        if arch.attention_softcap is not None and self.window:
            raise RecipeError(f"{where}.window: must be 0 where the source caps its scores (got {self.window})")
        return self.model_copy(update={"features": features})

    @property
    def num_features(self) -> int:
        """Features of each head of a resolved mixer."""
        assert self.features is not None, "only a resolved mixer has a number of features"
        return self.features

    @property
    def softmax_fit(self) -> SoftmaxFit:
        return self.fit

    def map_shape(self, arch: ArchSpec) -> Shape | None:
        """Returns the shape of each learned map, `[heads, head_dim, directions]`; None for a map without weights."""
        if self.feature_map in UNLEARNED:
            return None
        directions = self.num_features // 2 if self.feature_map == "hedgehog" else self.num_features
        return (arch.num_attention_heads, arch.head_dim, directions)

    def linears(self, arch: ArchSpec) -> dict[str, tuple[int, int]]:
        return attention_linears(arch)

    def vectors(self, arch: ArchSpec) -> dict[str, Shape]:
        found = attention_vectors(arch)
        shape = self.map_shape(arch)
        if shape is not None:
            found |= {"q_map.weight": shape, "k_map.weight": shape}
        if self.feature_map == "dijiang":
            found["map_weights.log"] = (arch.num_attention_heads, self.num_features)
        if self.window:
            found["blend.share"] = (arch.num_attention_heads,)
        return found

    def fills(self, arch: ArchSpec) -> Mapping[str, Fill]:
        directions = MAP_FILLS.get(self.feature_map, Fill("constant"))
        made = {
            "q_map.weight": directions,
            "k_map.weight": directions,
            "map_weights.log": Fill("constant", 0.0),
            # The sigmoid of it is the window's share beside the features, one tenth, as in LoLCATs.
            "blend.share": Fill("constant", -2.197),
        }
        vectors = self.vectors(arch)
        return {name: fill for name, fill in made.items() if name in vectors}

    def carried(self, arch: ArchSpec) -> Mapping[str, Carried]:
        """Returns every tensor of the source's attention."""
        found: dict[str, Carried] = {}
        for name in (*attention_vectors(arch), *(f"{name}.weight" for name in attention_linears(arch))):
            owner = name.rpartition(".")[0]
            found[name] = Carried(f"mixer.{name}", owner if owner.endswith("_proj") else "")
        return found

    def flops_per_token(self, arch: ArchSpec) -> int:
        heads, size = arch.num_attention_heads, arch.head_dim
        maps = 0 if self.map_shape(arch) is None else 4 * heads * size * self.num_features
        window = 4 * self.window * heads * size
        return maps + window + 4 * heads * self.num_features * self._value_width(arch)

    def state_elements(self, arch: ArchSpec) -> int:
        return arch.num_attention_heads * self.num_features * self._value_width(arch)

    def kept_elements(self, arch: ArchSpec) -> int:
        return self.window * (key_value_elements(arch) + 1)

    def _value_width(self, arch: ArchSpec) -> int:
        # The normaliser is one more channel of the values.
        return arch.head_dim + bool(self.normalise)
