"""Checks that a stack fits the paged cache of transformers' continuous batching, which holds keys and values."""

from refold.blueprint.part_sizes import head_counts
from refold.errors import RefoldError
from refold.modeling.configuration import RefoldConfig
from refold.modeling.masks import LAYER_TYPES


def require_pages(config: RefoldConfig) -> None:
    """Checks that every depth of a stack caches keys and values of all heads, since a paged cache stores nothing else.

    Raises:
        RefoldError: A depth keeps a recurrent state, or caches nothing, or some heads alone, or its attention has a
            soft-cap, a prefix or keys of other depths; or depths have different numbers of heads.
    """
    blueprint = config.read_blueprint()
    reasons = {
        "keeps a recurrent state or no cache at all": [
            index for index, kind in enumerate(config.layer_types or ()) if kind not in LAYER_TYPES
        ],
        "reads keys of another depth": [index for index, depth in enumerate(blueprint.depths) if depth.kv],
        "has a prefix": [index for index, depth in enumerate(blueprint.depths) if depth.prefix],
    }
    for reason, depths in reasons.items():
        if depths:
            raise RefoldError(
                f"generate_batch: depths that cache keys and values of all their heads are required (depth {depths[0]} "
                f"{reason}, which is not supported yet); use generate"
            )
    heads = head_counts(blueprint)
    if len(heads) > 1:
        raise RefoldError(
            f"generate_batch: the same number of key-value heads at every depth is required (got "
            f"{', '.join(map(str, heads))}, which is not supported yet); use generate"
        )
    if blueprint.arch.attention_softcap is not None:
        raise RefoldError(
            f"generate_batch: attention without a soft-cap is required (got {blueprint.arch.attention_softcap}, which "
            f"is not supported yet: the paged back-ends ignore it); use generate"
        )
