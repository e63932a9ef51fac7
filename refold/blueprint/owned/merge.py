"""The arithmetic that gives a weight of one depth: a stored tensor, low-rank products, and a scale."""

from dataclasses import dataclass, replace

from refold.blueprint.schema import Blueprint, Pool


@dataclass(frozen=True)
class Merge:
    """The names of the tensors that one weight of a depth is computed from.

    The weight is `(W + sum of B A + offset) scale - offset`, with the scale 1 where there is none.

    Attributes:
        stored: W; None where the products are everything.
        products: `(a, b)` of each B A, in the order they are added.
        scale: A tensor with one element.
        offset: A number that the architecture adds to the weight at run time (Gemma's norms), which is scaled too.
    """

    stored: str | None
    products: tuple[tuple[str, str], ...] = ()
    scale: str | None = None
    offset: float = 0.0

    def plus(self, a: str, b: str) -> "Merge":
        """Returns the same with one more product B A."""
        return replace(self, products=(*self.products, (a, b)))


def stored_weight(blueprint: Blueprint, pool: Pool, part: int, local: str) -> Merge:
    """Returns the merge of a tensor as its stored part holds it: whole, as two factors, or not at all.

    Args:
        blueprint: The stack.
        pool: Of the part.
        part: Its index.
        local: The tensor's name in it, such as `q_proj.weight`.
    """
    name, held = f"model.{pool}s.{part}", blueprint.pool(pool)[part]
    linear, _, kind = local.rpartition(".")
    if kind != "weight" or linear not in held.factors | held.bases:
        return Merge(f"{name}.{local}")
    merge = Merge(None)
    return merge.plus(f"{name}.{linear}.a.weight", f"{name}.{linear}.b.weight") if held.factors.get(linear) else merge
