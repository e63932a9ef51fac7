"""Linear attention: the softmax is replaced by a product of feature maps, optionally with a softmax window."""

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
"""The paper of each feature map."""
UNLEARNED = ("elu", "relu")
MAP_FILLS: Mapping[str, Fill] = {
    "t2r": Fill("identity", 1.0),
    "hedgehog": Fill("identity", 1.0),
    "favor": Fill("orthogonal"),
    "dijiang": Fill("cosine"),
}
"""The initial weights of each feature map that has weights."""


class LinearAttention(MixerSpec):
    """Approximates softmax attention by phi(Q) phi(K)^T (arXiv 2006.16236)."""

    url = "https://arxiv.org/abs/2006.16236"
    is_recurrent = True
    transfers_all = True

    type: Literal["linear_attention"] = "linear_attention"
    feature_map: Literal["elu", "relu", "t2r", "hedgehog", "favor", "dijiang"] = "hedgehog"
    """The feature map phi: `elu` plus 1; `relu`; a learned linear with a relu (`t2r`) or with the softmax of its
    outputs and their negatives (`hedgehog`); positive random features (`favor`); weighted cosine features
    (`dijiang`)."""
    features: Count | None = None
    """Number of features of each head: the rank of the approximation. Default: the head size, for `hedgehog` twice."""
    normalise: bool = True
    """Whether attention weights are divided by their sum, as in the softmax."""
    window: LayerIndex = 0
    """Number of latest tokens, itself included, that a token attends to by softmax. All earlier tokens are attended to
    by features, under one normaliser (LoLCATs, arXiv 2410.10254). 0: features only."""
    fit: SoftmaxFit = "none"
    """Inputs on which learned maps are fitted to the source's attention before healing: `none` (no fit), random hidden
    states (`data_free`), or the text given at conversion (`calibration`)."""

    def resolve(self, arch: ArchSpec, where: str) -> "LinearAttention":
        """Fills in the number of features.

        Raises:
            RecipeError: The map cannot have this number of features, or has no weights to fit.
        """
        name, size = self.feature_map, arch.head_dim
        features = self.features or (2 * size if name == "hedgehog" else size)
        if name in UNLEARNED and features != size:
            raise RecipeError(
                f"{where}.features: must be {size} for {name}, with one feature per head dimension (got {features})"
            )
        if name == "hedgehog" and features % 2:
            raise RecipeError(
                f"{where}.features: must be even for hedgehog, which pairs each feature with its negative "
                f"(got {features})"
            )
        if self.fit != "none" and name not in ("t2r", "hedgehog"):
            raise RecipeError(f"{where}.fit: requires a learned map, t2r or hedgehog (got {name}); remove fit")
        if self.window and not self.normalise:
            raise RecipeError(f"{where}.normalise: must be true where window is above 0 (got false)")
        if arch.attention_softcap is not None and self.window:
            raise RecipeError(
                f"{where}.window: must be 0 where the source caps its attention scores (got {self.window})"
            )
        return self.model_copy(update={"features": features})

    @property
    def num_features(self) -> int:
        """Number of features of each head of a resolved mixer."""
        assert self.features is not None, "only a resolved mixer has a number of features"
        return self.features

    @property
    def softmax_fit(self) -> SoftmaxFit:
        return self.fit

    def map_shape(self, arch: ArchSpec) -> Shape | None:
        """Returns the shape `[heads, head_dim, directions]` of a map's weights; None for a map without weights."""
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
            # sigmoid(-2.197) = 0.1: the initial weight of the window against the features, as in LoLCATs.
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
        # The normaliser is stored as one more channel of the values.
        return arch.head_dim + bool(self.normalise)
