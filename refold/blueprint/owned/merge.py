"""The formula of one weight at one depth: a stored tensor plus low-rank products, times a scale."""

from dataclasses import dataclass, replace

from refold.blueprint.schema import Blueprint, Pool


@dataclass(frozen=True)
class Merge:
    """The names of the tensors in the formula `(W + sum of B A + offset) scale - offset` of one weight.

    Attributes:
        stored: Name of W; None: no W is stored, and W is 0.
        products: Names `(a, b)` of each product B A, in the order of addition.
        scale: Name of a tensor with one element; None: the scale is 1.
        offset: Number that the architecture adds to the weight at run time (Gemma's norms), which is scaled too.
    """

    stored: str | None
    products: tuple[tuple[str, str], ...] = ()
    scale: str | None = None
    offset: float = 0.0

    def plus(self, a: str, b: str) -> "Merge":
        """Returns a copy with one more product B A."""
        return replace(self, products=(*self.products, (a, b)))


def stored_weight(blueprint: Blueprint, pool: Pool, part: int, local: str) -> Merge:
    """Returns the merge of a weight of a stored part, before any depth adds to it.

    Args:
        blueprint: The stack.
        pool: The pool of the part.
        part: The index of the part.
        local: The weight's name in the part, such as `q_proj.weight`.
    """
    name, held = f"model.{pool}s.{part}", blueprint.pool(pool)[part]
    linear, _, kind = local.rpartition(".")
    if kind != "weight" or linear not in held.factors | held.bases:
        return Merge(f"{name}.{local}")
    merge = Merge(None)
    return merge.plus(f"{name}.{linear}.a.weight", f"{name}.{linear}.b.weight") if held.factors.get(linear) else merge
