"""How much each part of a source does to the stream, which says what can be left out."""

from refold.families.arch import Frozen


class Influence(Frozen):
    """One minus the cosine similarity of the stream before and after, a mean over tokens, by source layer.

    Of whole layers it is ShortGPT's block influence (arXiv 2403.03853, equation 1). Of sub-layers it is LLM-Drop's
    importance (arXiv 2406.15786, section 3): the stream against the stream plus what the sub-layer adds, with the norms
    that belong to it.
    """

    block: tuple[float, ...]
    attention: tuple[float, ...]
    mlp: tuple[float, ...]
