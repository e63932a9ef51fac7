"""Linears that read one input, joined into one product, and the adapters of a depth for them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refold.nn.factored import BasisLinear, FactoredLinear
from refold.nn.lora import PackedAdapter, PackedRows
from refold.nn.products import PlainProduct, Product
from refold.nn.quantised import QuantisedLinear
from refold.nn.weights import Weight, weight_of
from refold.nn.workshop import Workshop


class StoredAdapter(NamedTuple):
    """The tensors of one depth for one linear, as they are stored.

    Attributes:
        pair: LoRA factors; None: the depth has no LoRA here.
        coefficients: Of a basis; None: the part stores no basis.
    """

    pair: tuple[Weight, Weight] | None
    coefficients: Weight | None


class JoinedAdapters(PackedAdapter):
    """The adapters of one depth for joined linears: their A stacked into one product, and products with their B.

    Args:
        linears: That they change.
        adapters: By linear name; those of other linears are ignored.
        workshop: Prepares the products.
        formats: Of LoRA factors, and of coefficients of bases.
        beside: Adapters with the same coefficients, which are used once more; None: they are among `adapters`.
    """

    def __init__(
        self,
        linears: "JoinedLinears",
        adapters: Mapping[str, StoredAdapter],
        workshop: Workshop,
        formats: tuple[str, str],
        beside: "JoinedAdapters | None" = None,
    ):
        own = {name: adapters[name] for name in linears.names if name in adapters}
        self._coefficients = {} if beside is None else beside._coefficients
        for name, each in own.items() if beside is None else ():
            if each.coefficients is not None:
                self._coefficients[name] = workshop.make(f"{name} coefficients", each.coefficients, None, formats[1])
        pairs = {name: each.pair for name, each in own.items() if each.pair is not None}
        self._low: Product | None = None
        # Columns of the outputs, columns of A x, and B; None: all columns.
        self._ups: list[tuple[slice | None, slice | None, Product]] = []
        if not pairs:
            return
        told = "+".join(pairs)
        self._low = workshop.make_beside(f"{told} lora_a", [a for a, _ in pairs.values()], None, formats[0])
        ends = _ends([a.shape[0] for a, _ in pairs.values()])
        floats = [b for _, b in pairs.values() if isinstance(b, Tensor)]
        shape = (linears.outputs[linears.names[-1]].stop, ends[-1].stop)
        num_zeros = shape[0] * shape[1] - sum(b.numel() for b in floats)
        are_floats = len(floats) == len(pairs)
        if are_floats and len(linears.names) > 1 and num_zeros <= workshop.most_zeros(formats[0]):
            # One product with zeros between the B's: to begin more products takes longer than to read the zeros.
            blocks = floats[0].new_zeros(shape)
            for name, b, columns in zip(pairs, floats, ends, strict=True):
                blocks[linears.outputs[name], columns] = b.detach()
            self._ups.append((None, None, workshop.make(f"{told} lora_b", blocks, None, formats[0])))
            return
        for (name, (_, b)), columns in zip(pairs.items(), ends, strict=True):
            up = workshop.make(f"{name} lora_b", b, None, formats[0])
            is_all = len(linears.names) == 1
            self._ups.append((None, None, up) if is_all else (linears.outputs[name], columns, up))

    def finish_basis(self, name: str, low: Float[Tensor, "rows rank"]) -> Float[Tensor, "rows out"]:
        """Multiplies the projection onto a shared basis by this depth's coefficients."""
        return self._coefficients[name](low)

    def add_updates(self, y: Float[Tensor, "rows out"], x: Float[Tensor, "rows in"], columns: slice | None) -> None:
        """Adds B (A x) in place.

        Args:
            y: Outputs of neighbouring linears, side by side.
            x: Their input.
            columns: The columns of y among the outputs of all linears; None: y holds all.
        """
        if self._low is None:
            return
        low = self._low(x)
        for outputs, ranks, up in self._ups:
            part = low if ranks is None else low[:, ranks]
            if columns is None:
                up.add_to(y if outputs is None else y[:, outputs], part)
            elif outputs is None:
                y.add_(up(part)[:, columns])
            elif columns.start <= outputs.start and outputs.stop <= columns.stop:
                up.add_to(y[:, outputs.start - columns.start : outputs.stop - columns.start], part)


class JoinedLinears:
    """Linears of a stored part that read one input, as one product.

    Args:
        linears: By name: plain linears, linears stored as two factors, and bases.
        workshop: Prepares the products.
        format: Of the weights.

    Attributes:
        names: Of the linears, in order.
        outputs: Columns of each linear, side by side.
        key: Name of the group, under which adapters of a depth are found.
        bias_name: Name of the joined biases among vectors of a depth's own.
    """

    def __init__(self, linears: Mapping[str, nn.Module], workshop: Workshop, format: str):
        modules = cast("dict[str, nn.Linear | QuantisedLinear | FactoredLinear | BasisLinear]", dict(linears))
        self.names = tuple(modules)
        self.key = "+".join(modules)
        self.bias_name = f"{self.key}.bias"
        self._sizes = [each.out_features for each in modules.values()]
        self.outputs = dict(zip(self.names, _ends(self._sizes), strict=True))
        self._bases = {name for name, each in modules.items() if isinstance(each, BasisLinear)}
        # Rank 0 stores no factor.
        self._seconds = {
            name: None if each.b is None else workshop.make(f"{name}.b", weight_of(each.b), None, format)
            for name, each in modules.items()
            if isinstance(each, FactoredLinear)
        }
        self._is_plain = not self._bases and not self._seconds
        firsts = {
            name: each if isinstance(each, nn.Linear | QuantisedLinear) else each.a for name, each in modules.items()
        }
        weights = {name: weight_of(each) for name, each in firsts.items() if each is not None}
        self._columns = dict(zip(weights, _ends([each.shape[0] for each in weights.values()]), strict=True))
        biases = {name: each.bias for name, each in modules.items() if each.bias is not None}
        bias = self.join_biases(biases)
        self._bias = None if bias is None or self._is_plain else bias.to(workshop.dtype)
        given = bias if self._is_plain else None
        if weights:
            self._first = workshop.make_beside(self.key, list(weights.values()), given, format)
        else:
            self._first = PlainProduct(torch.zeros(0, next(iter(modules.values())).in_features), None)
        self._cut: dict[tuple[int, int], Product | None] = {}

    def join_biases(self, biases: Mapping[str, Tensor]) -> Float[Tensor, " out"] | None:
        """Returns the biases side by side, zero for linears without one; None where no linear has one."""
        given = next((biases[name] for name in self.names if name in biases), None)
        if given is None:
            return None
        sizes = zip(self.names, self._sizes, strict=True)
        return torch.cat([biases[name].detach() if name in biases else given.new_zeros(size) for name, size in sizes])

    def __call__(
        self,
        names: tuple[str, ...],
        x: Float[Tensor, "*batch in"],
        adapters: PackedAdapter | None,
        bias: Tensor | None,
    ) -> Float[Tensor, "*batch out"]:
        """Returns the outputs of neighbouring linears, side by side.

        Args:
            names: Of these linears, in order.
            x: Their input.
            adapters: Of the calling depth, or of the depths at which groups of rows stand.
            bias: Of the depth's own, as `join_biases` joins it, `[out]` or `[B, 1, out]`; None: there is none.
        """
        flat = x.reshape(-1, x.shape[-1])
        if adapters is None and bias is None and self._is_plain and names == self.names:
            y = self._first(flat)
            return y.view(*x.shape[:-1], y.shape[1])
        columns = None if names == self.names else slice(self.outputs[names[0]].start, self.outputs[names[-1]].stop)
        groups = () if adapters is None else self._groups(x, adapters)
        if not self._is_plain:
            y = self._finish(flat, groups)
            y = y if columns is None else y[:, columns]
        elif columns is None:
            y = self._first(flat)
        else:
            y = self._run_some(flat, columns)
        for rows, own in groups:
            own.add_updates(*((y, flat) if rows is None else (y[rows], flat[rows])), columns)
        y = y.view(*x.shape[:-1], y.shape[1])
        if bias is not None:
            y.add_(bias if columns is None else bias[..., columns])
        return y

    def _run_some(self, x: Float[Tensor, "rows in"], columns: slice) -> Float[Tensor, "rows some"]:
        """Runs the part of the product that gives some of the outputs; all of it where the weight cannot be cut."""
        key = (columns.start, columns.stop)
        if key not in self._cut:
            self._cut[key] = self._first.cut(columns)
        cut = self._cut[key]
        return self._first(x)[:, columns] if cut is None else cut(x)

    def _finish(self, x: Tensor, groups: Sequence[tuple[slice | None, JoinedAdapters]]) -> Tensor:
        """Returns the outputs of linears of which some are stored as factors or bases."""
        y = x.new_zeros(len(x), sum(self._sizes))
        first = self._first(x) if self._columns else x
        for name, outputs in self.outputs.items():
            columns = self._columns.get(name)
            if columns is None:
                continue
            piece = first[:, columns]
            if name in self._bases:
                for rows, own in groups:
                    place = (slice(None) if rows is None else rows, outputs)
                    y[place] = own.finish_basis(name, piece if rows is None else piece[rows])
                continue
            second = self._seconds.get(name)
            y[:, outputs] = piece if second is None else second(piece)
        return y if self._bias is None else y.add_(self._bias)

    def _groups(self, x: Tensor, adapters: PackedAdapter) -> Sequence[tuple[slice | None, JoinedAdapters]]:
        """Returns the adapters of each group of rows, counted in rows of the flat input; None: all rows."""
        if isinstance(adapters, JoinedAdapters):
            return ((None, adapters),)
        assert isinstance(adapters, PackedRows)
        tokens = x.shape[1] if x.ndim == 3 else 1
        groups = cast("tuple[tuple[slice, JoinedAdapters], ...]", adapters.groups)
        return [(slice(rows.start * tokens, rows.stop * tokens), own) for rows, own in groups]


def _ends(sizes: Sequence[int]) -> list[slice]:
    """Returns the columns of pieces that lie side by side."""
    found, begin = [], 0
    for size in sizes:
        found.append(slice(begin, begin + size))
        begin += size
    return found
