"""What a target remembers beside its source, at short and long contexts."""

from refold.blueprint.cost import Cost, smaller_from
from refold.families.arch import Frozen

MEMORY_CONTEXTS = (1_024, 32_768, 1_048_576)


class ContextMemory(Frozen):
    """Bytes of cache and state of one sequence."""

    context: int
    source: int
    target: int


class Memory(Frozen):
    """Cache and state of source and target, and from where on the target needs less in all."""

    cache_and_state: tuple[ContextMemory, ...]
    smaller_from: int | None
    """Context from which on weights, cache and state of the target take less than the source's; 0: at every length;
    None: at no length from which on it stays so."""

    def describe(self) -> str:
        """`from 1,234 tokens on`, or the words for 0 and None."""
        if self.smaller_from is None:
            return "never"
        return f"from {self.smaller_from:,} tokens on" if self.smaller_from else "at every length"


def compare_memory(source: Cost, target: Cost) -> Memory:
    """Compares what a source and its target take."""
    return Memory(
        cache_and_state=tuple(
            ContextMemory(context=each, source=source.cache_bytes(each), target=target.cache_bytes(each))
            for each in MEMORY_CONTEXTS
        ),
        smaller_from=smaller_from(source, target),
    )
