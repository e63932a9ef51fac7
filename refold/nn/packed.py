"""A stored part prepared for inference: joined linears as products, and norms in few operations."""

from collections.abc import Mapping, Sequence
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from refold.nn.factored import BasisLinear, FactoredLinear
from refold.nn.joined import JoinedAdapters, JoinedLinears, StoredAdapter
from refold.nn.lora import LinearAdapter, PackedAdapter
from refold.nn.norms import StackNorm
from refold.nn.quantised import QuantisedLinear
from refold.nn.workshop import Workshop


class PackedPart:
    """The linears and norms of a stored part, ready to run without gradients.

    Args:
        part: Whose linears and norms are taken.
        inputs: Names of linears that read one input, group by group; other linears are groups of their own.
        workshop: Prepares the products.
        format: Of the weights.
    """

    def __init__(self, part: nn.Module, inputs: Sequence[tuple[str, ...]], workshop: Workshop, format: str):
        kinds = (nn.Linear, QuantisedLinear, FactoredLinear, BasisLinear)
        linears = {name: each for name, each in part.named_children() if isinstance(each, kinds)}
        groups = [tuple(name for name in group if name in linears) for group in inputs]
        grouped = {name for group in groups for name in group}
        self.names = tuple(linears)
        self.groups = [
            JoinedLinears({name: linears[name] for name in group}, workshop, format)
            for group in (*groups, *((name,) for name in linears if name not in grouped))
            if group
        ]
        self._group_of = {name: group for group in self.groups for name in group.names}
        self._sizes: dict[tuple[str, ...], list[int]] = {}
        self._norms = {name: each.fuse() for name, each in part.named_children() if isinstance(each, StackNorm)}

    def project(
        self,
        names: tuple[str, ...],
        x: Float[Tensor, "*batch in"],
        lora: Mapping[str, LinearAdapter],
        vectors: Mapping[str, Tensor] | None,
    ) -> Float[Tensor, "*batch out"]:
        """Runs neighbouring linears of one group and returns their outputs side by side.

        Args:
            names: Of the linears, in order.
            x: Their input.
            lora: From `join_adapters`.
            vectors: From `join_vectors`.
        """
        group = self._group_of[names[0]]
        adapters = cast("PackedAdapter | None", lora.get(group.key))
        return group(names, x, adapters, None if vectors is None else vectors.get(group.bias_name))

    def split(self, names: tuple[str, ...], joined: Float[Tensor, "*batch out"]) -> tuple[Tensor, ...]:
        """Returns the outputs of each linear, as views."""
        sizes = self._sizes.get(names)
        if sizes is None:
            outputs = self._group_of[names[0]].outputs
            sizes = self._sizes[names] = [outputs[name].stop - outputs[name].start for name in names]
        return joined.split_with_sizes(sizes, -1)

    def normalise(self, name: str, x: Tensor, vectors: Mapping[str, Tensor] | None) -> Tensor:
        """Runs a norm, with vectors from `join_vectors`; returns `x` for a norm that the part lacks."""
        norm = self._norms.get(name)
        if norm is None:
            return x
        if vectors is None:
            return norm(x)
        return norm(x, vectors[f"{name}.weight"], vectors.get(f"{name}.bias"))

    def join_adapters(
        self,
        adapters: Mapping[str, StoredAdapter],
        workshop: Workshop,
        formats: tuple[str, str],
        beside: Mapping[str, LinearAdapter] | None = None,
    ) -> dict[str, JoinedAdapters]:
        """Returns the adapters of one depth for this part, by the key of the linears they change.

        Args:
            adapters: By linear name; those of other parts are ignored.
            workshop: Prepares the products.
            formats: Of LoRA factors, and of coefficients of bases.
            beside: What this method returned for a depth with the same coefficients, which are used once more; None:
                they are among the adapters.
        """
        found: dict[str, JoinedAdapters] = {}
        for group in self.groups:
            other = None if beside is None else cast("JoinedAdapters | None", beside.get(group.key))
            if any(name in adapters for name in group.names):
                found[group.key] = JoinedAdapters(group, adapters, workshop, formats, other)
            elif other is not None:
                found[group.key] = other
        return found

    def join_vectors(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns a depth's own vectors, with the weights of norms prepared and the biases of linears joined."""
        found = {name: vector.detach() for name, vector in vectors.items()}
        for name, norm in self._norms.items():
            if f"{name}.weight" in found:
                found[f"{name}.weight"] = norm.prepare(found[f"{name}.weight"])
        for group in self.groups:
            biases = {name: found.pop(f"{name}.bias") for name in group.names if f"{name}.bias" in found}
            joined = group.join_biases(biases)
            if joined is not None:
                found[group.bias_name] = joined
        return found
