"""Attention whose softmax is replaced by the product of feature maps, with a window of softmax beside it if asked."""

from collections.abc import Mapping
from typing import Any, Literal

from refold.errors import RecipeError
from refold.families.arch import ArchSpec
from refold.fields import Count, LayerIndex
from refold.mixers import attention
from refold.mixers.placement import MixerSwap, Transfer
from refold.mixers.spec import Carried, Fill, PartSpec, Shape

FEATURE_MAPS: Mapping[str, str] = {
    "elu": "https://arxiv.org/abs/2006.16236",
    "relu": "https://arxiv.org/abs/2103.13076",
    "t2r": "https://arxiv.org/abs/2103.13076",
    "hedgehog": "https://arxiv.org/abs/2402.04347",
    "favor": "https://arxiv.org/abs/2009.14794",
    "dijiang": "https://arxiv.org/abs/2403.19928",
}
"""Where each map comes from."""
UNLEARNED = ("elu", "relu")


class LinearAttention(MixerSwap):
    """Approximates softmax attention by phi(Q) phi(K)^T (arXiv 2006.16236)."""

    type: Literal["linear_attention"] = "linear_attention"
    transfer: Transfer = "all"
    """What is taken over from the source's layer besides its norms: `all`, or some of `q_proj`, `k_proj`, `v_proj`,
    `o_proj` and `mlp`."""
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
    fit: Literal["none", "data_free", "calibration"] = "none"
    """What learned maps are fitted to before healing: nothing, the source's attention on random inputs, or on the text
    given at conversion."""


def resolve(arch: ArchSpec, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the options with the number of features filled in.

    Raises:
        RecipeError: Features that this map cannot have, or a fit of a map without weights.
    """
    name, size = options["feature_map"], arch.head_dim
    features = options["features"] or (2 * size if name == "hedgehog" else size)
    if name in UNLEARNED and features != size:
        raise RecipeError(
            f"{where}.features: must be {size} for {name}, which maps each number of a head (got {features})"
        )
    if name == "hedgehog" and features % 2:
        raise RecipeError(
            f"{where}.features: must be even for hedgehog, which has each with its negative (got {features})"
        )
    if options["fit"] != "none" and name not in ("t2r", "hedgehog"):
        raise RecipeError(f"{where}.fit: requires a learned map, t2r or hedgehog (got {name}); leave fit out")
    if options["window"] and not options["normalise"]:
        raise RecipeError(f"{where}.normalise: must be true where a window is attended to by softmax (got false)")
    if arch.attention_softcap is not None and options["window"]:
        raise RecipeError(f"{where}.window: must be 0 where the source caps its scores (got {options['window']})")
    return dict(options, features=features)


def map_shape(arch: ArchSpec, options: Mapping[str, Any]) -> Shape | None:
    """Shape of each learned map, `[heads, head_dim, directions]`; None where a map has no weights."""
    if options["feature_map"] in UNLEARNED:
        return None
    directions = options["features"] // 2 if options["feature_map"] == "hedgehog" else options["features"]
    return (arch.num_attention_heads, arch.head_dim, directions)


def vectors(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, Shape]:
    found = attention.vectors(arch, {})
    shape = map_shape(arch, options)
    if shape is not None:
        found |= {"q_map.weight": shape, "k_map.weight": shape}
    if options["feature_map"] == "dijiang":
        found["map_weights.log"] = (arch.num_attention_heads, options["features"])
    if options["window"]:
        found["blend.share"] = (arch.num_attention_heads,)
    return found


def fills(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, Fill]:
    kind = {
        "t2r": Fill("identity", 1.0),
        "hedgehog": Fill("identity", 1.0),
        "favor": Fill("orthogonal"),
        "dijiang": Fill("cosine"),
    }.get(options["feature_map"], Fill("constant"))
    made = {
        "q_map.weight": kind,
        "k_map.weight": kind,
        "map_weights.log": Fill("constant", 0.0),
        # The sigmoid of it is the window's share beside the features, one tenth, as in LoLCATs.
        "blend.share": Fill("constant", -2.197),
    }
    return {name: fill for name, fill in made.items() if name in vectors(arch, options)}


def carried(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, Carried]:
    """All that attention has."""
    found: dict[str, Carried] = {}
    for name in (*attention.vectors(arch, {}), *(f"{name}.weight" for name in attention.linears(arch, {}))):
        owner = name.rpartition(".")[0]
        found[name] = Carried(f"mixer.{name}", owner if owner.endswith("_proj") else "")
    return found


def _value_width(arch: ArchSpec, options: Mapping[str, Any]) -> int:
    # The normaliser is one more channel of the values.
    return arch.head_dim + bool(options["normalise"])


def recurrence_flops(arch: ArchSpec, options: Mapping[str, Any]) -> int:
    heads, size = arch.num_attention_heads, arch.head_dim
    maps = 0 if map_shape(arch, options) is None else 4 * heads * size * options["features"]
    window = 4 * options["window"] * heads * size
    return maps + window + 4 * heads * options["features"] * _value_width(arch, options)


SPEC = PartSpec(
    name="linear_attention",
    url="https://arxiv.org/abs/2006.16236",
    linears=lambda arch, options: attention.linears(arch, {}),
    vectors=vectors,
    flops_per_token=recurrence_flops,
    state_elements=lambda arch, options: arch.num_attention_heads * options["features"] * _value_width(arch, options),
    kept_elements=lambda arch, options: options["window"] * (attention.cached_numbers(arch, {}) + 1),
    fills=fills,
    carried=carried,
    resolve=resolve,
    is_recurrent=True,
    approximates_softmax=True,
)
