"""What stands out in measurements: the parts that matter least, and the layers most alike."""

from refold.sources.measurements import Influence, Similarity

NUM_NAMED = 3


def least_important(influence: Influence, count: int = NUM_NAMED) -> dict[str, tuple[int, ...]]:
    """Returns for blocks, attention and MLPs the layers that change the stream least, least first."""
    return {
        name: tuple(sorted(range(len(values)), key=lambda layer: values[layer])[:count])
        for name, values in (("block", influence.block), ("attention", influence.attention), ("MLP", influence.mlp))
    }


def most_alike(similarity: Similarity, count: int = NUM_NAMED) -> list[tuple[float, int, int]]:
    """Returns the pairs of layers whose weights are nearest, with their mean distance over linears."""
    return similarity.pairs()[:count]
