"""Linears of a stored part on vLLM's layers, split among processes, with the adapters that depths add to them."""

# pyright: reportMissingImports=false
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as multiply
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from refold.nn.factored import BasisLinear, FactoredLinear
from refold.nn.lora import LinearAdapter, PackedAdapter
from refold.nn.norms import StackNorm
from refold.plugins.vllm.shares import COLUMN_PARALLEL, Shares, TensorPlaces, empty

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
MLP_INPUTS = ("gate_proj", "up_proj")
FUSED = {"qkv_proj": list(ATTENTION_INPUTS), "gate_up_proj": list(MLP_INPUTS)}
"""vLLM's names of joined linears, for the configs of quantised folders."""


class DepthAdapter(nn.Module, PackedAdapter):
    """The LoRA factors and coefficients of one depth for linears that read one input: their A side by side.

    Args:
        key: Of the group of linears.
        names: Of those of its linears that the depth runs.
        sizes: By linear name: LoRA ranks, ranks of bases, and `(out, in)` of all processes together.
        shares: Of this process.
        places: Receives the places of the tensors.
        prefix: Of the depth's tensors.
    """

    def __init__(
        self,
        key: str,
        names: Sequence[str],
        sizes: tuple[Mapping[str, int], Mapping[str, int], Mapping[str, tuple[int, int]]],
        shares: Shares,
        places: TensorPlaces,
        prefix: str,
    ):
        super().__init__()
        self.key, (ranks, coefficients, shapes) = key, sizes
        self.ups, self.coefficients = nn.ParameterDict(), nn.ParameterDict()
        self.columns: dict[str, slice] = {}
        for name in (each for each in names if each in coefficients):
            rows, _ = shares.sides(name)
            self.coefficients[name] = empty(_length(rows, shapes[name][0]), coefficients[name])
            places.allot(f"{prefix}.coefficients.{name}", self.coefficients[name], (rows,))
        own = [name for name in names if name in ranks]
        if not own:
            return
        _, columns = shares.sides(own[0])
        self.a = empty(sum(ranks[name] for name in own), _length(columns, shapes[own[0]][1]))
        begin = 0
        for name in own:
            at = slice(begin, begin + ranks[name])
            rows, columns = shares.sides(name)
            self.columns[name], self.ups[name] = at, empty(_length(rows, shapes[name][0]), ranks[name])
            places.allot(f"{prefix}.lora.{name}.a", self.a, (slice(None), columns), at)
            places.allot(f"{prefix}.lora.{name}.b", self.ups[name], (rows,))
            begin = at.stop

    def add(self, outputs: dict[str, Tensor], x: Tensor) -> None:
        """Adds B (A x) to the outputs by linear name."""
        if not any(name in self.columns for name in outputs):
            return
        low = multiply(x, self.a)
        for name in [each for each in outputs if each in self.columns]:
            outputs[name] = outputs[name] + multiply(low[:, self.columns[name]], self.ups[name])


class ParallelLinears(nn.Module):
    """Linears that read one input.

    Args:
        linears: By name: whole ones, ones stored as factors, and bases; their shapes are taken, not their weights.
        shares: Of this process.
        places: Receives the places of the tensors.
        quantisation: vLLM's config of a quantised folder, or None.
        prefix: Of the part's tensors.
    """

    def __init__(
        self, linears: Mapping[str, nn.Module], shares: Shares, places: TensorPlaces, quantisation: Any, prefix: str
    ):
        super().__init__()
        modules = cast("dict[str, nn.Linear | FactoredLinear | BasisLinear]", dict(linears))
        self.names, self.key = tuple(modules), "+".join(modules)
        self.is_column = self.names[0] in COLUMN_PARALLEL
        self.sums = not self.is_column and shares.size > 1
        self.sizes = {name: _length(shares.sides(name)[0], each.out_features) for name, each in modules.items()}
        self.firsts, self.seconds, self.biases = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.whole = nn.ModuleDict()
        self.bases: set[str] = set()
        self.fused: tuple[str, ...] = ()
        whole = {name: each for name, each in modules.items() if isinstance(each, nn.Linear)}
        for name, each in modules.items():
            (rows, columns), path = shares.sides(name), f"{prefix}.{name}"
            if each.bias is not None and not (name in whole and self.is_column):
                # The bias of a sum over processes is added once, after the sum.
                self.biases[name] = empty(self.sizes[name])
                places.allot(f"{path}.bias", self.biases[name], (rows,))
            if name in whole or isinstance(each, nn.Linear):
                continue
            if isinstance(each, BasisLinear):
                self.bases.add(name)
            if each.rank:
                self.firsts[name] = empty(each.rank, _length(columns, each.in_features))
                places.allot(f"{path}.a.weight", self.firsts[name], (slice(None), columns))
            if isinstance(each, FactoredLinear) and each.rank:
                self.seconds[name] = empty(self.sizes[name], each.rank)
                places.allot(f"{path}.b.weight", self.seconds[name], (rows,))
        self._make_whole(whole, shares, places, quantisation, prefix)

    def _make_whole(
        self, whole: Mapping[str, nn.Linear], shares: Shares, places: TensorPlaces, quantisation: Any, prefix: str
    ) -> None:
        arch = shares.arch
        given = {"quant_config": quantisation, "return_bias": False}
        has_bias = {each.bias is not None for each in whole.values()}
        if set(whole) == set(ATTENTION_INPUTS) and len(has_bias) == 1:
            heads = (arch.hidden_size, arch.head_dim, arch.num_attention_heads, arch.num_key_value_heads)
            layer: Any = QKVParallelLinear(*heads, bias=has_bias.pop(), prefix=f"{prefix}.qkv_proj", **given)
            self._fuse(layer, ATTENTION_INPUTS, ("q", "k", "v"), places, prefix)
        elif set(whole) == set(MLP_INPUTS) and len(has_bias) == 1:
            sizes = [arch.intermediate_size] * 2
            path = f"{prefix}.gate_up_proj"
            layer = MergedColumnParallelLinear(arch.hidden_size, sizes, bias=has_bias.pop(), prefix=path, **given)
            self._fuse(layer, MLP_INPUTS, (0, 1), places, prefix)
        else:
            for name, each in whole.items():
                sizes, path = (each.in_features, each.out_features), f"{prefix}.{name}"
                if self.is_column:
                    layer = ColumnParallelLinear(*sizes, bias=each.bias is not None, prefix=path, **given)
                else:
                    layer = RowParallelLinear(*sizes, bias=False, reduce_results=False, prefix=path, **given)
                self.whole[name] = layer
                for kind, parameter in layer.named_parameters():
                    places.put(f"{path}.{kind}", _loader(parameter))

    def _fuse(
        self, layer: Any, names: tuple[str, ...], keys: tuple[Any, ...], places: TensorPlaces, prefix: str
    ) -> None:
        self.fused, self.whole["fused"] = names, layer
        for name, key in zip(names, keys, strict=True):
            for kind, parameter in layer.named_parameters():
                places.put(f"{prefix}.{name}.{kind}", _loader(parameter, key))

    def forward(
        self, names: tuple[str, ...], x: Tensor, adapter: DepthAdapter | None, vectors: Mapping[str, Tensor] | None
    ) -> Tensor:
        """Returns the outputs of some of the linears side by side, `[tokens, out]`.

        Args:
            names: Of these linears.
            x: `[tokens, in]`.
            adapter: Of the calling depth.
            vectors: Biases of the calling depth's own, where it has some.
        """
        outputs = self._products(names, x, adapter)
        if adapter is not None:
            adapter.add(outputs, x)
        if self.sums:
            outputs = {name: tensor_model_parallel_all_reduce(y) for name, y in outputs.items()}
        for name, y in outputs.items():
            if name in self.biases:
                outputs[name] = y = y + self.biases[name]
            if vectors is not None and f"{name}.bias" in vectors:
                outputs[name] = y + vectors[f"{name}.bias"]
        return outputs[names[0]] if len(names) == 1 else torch.cat([outputs[name] for name in names], dim=-1)

    def _products(self, names: tuple[str, ...], x: Tensor, adapter: DepthAdapter | None) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        if any(name in self.fused for name in names):
            parts = self.whole["fused"](x).split([self.sizes[name] for name in self.fused], dim=-1)
            outputs = {name: part for name, part in zip(self.fused, parts, strict=True) if name in names}
        for name in (each for each in names if each not in outputs):
            if name in self.whole:
                outputs[name] = self.whole[name](x)
            elif name not in self.firsts:
                outputs[name] = x.new_zeros(len(x), self.sizes[name])
            else:
                low = multiply(x, self.firsts[name])
                if name in self.bases:
                    assert adapter is not None
                    outputs[name] = multiply(low, adapter.coefficients[name])
                else:
                    outputs[name] = multiply(low, self.seconds[name])
        return outputs


class ParallelPart(nn.Module):
    """The linears and norms of a stored part, in the place of `PackedPart`.

    Args:
        part: Whose linears are replaced; its norms stay.
        inputs: Names of linears that read one input, group by group.
        shares: Of this process.
        places: Receives the places of the tensors.
        quantisation: vLLM's config of a quantised folder, or None.
        prefix: Of the part's tensors.
    """

    def __init__(
        self,
        part: nn.Module,
        inputs: Sequence[tuple[str, ...]],
        shares: Shares,
        places: TensorPlaces,
        quantisation: Any,
        prefix: str,
    ):
        super().__init__()
        kinds = (nn.Linear, FactoredLinear, BasisLinear)
        linears = {name: each for name, each in part.named_children() if isinstance(each, kinds)}
        self.norms = {name: each for name, each in part.named_children() if isinstance(each, StackNorm)}
        grouped = {name for group in inputs for name in group}
        groups = [*inputs, *((name,) for name in linears if name not in grouped)]
        held = [{name: linears[name] for name in group if name in linears} for group in groups]
        self.groups = nn.ModuleList(
            ParallelLinears(each, shares, places, quantisation, prefix) for each in held if each
        )
        self.names = tuple(linears)
        self.group_of = {name: group for group in self.groups for name in cast("ParallelLinears", group).names}

    def project(
        self,
        names: tuple[str, ...],
        x: Tensor,
        lora: Mapping[str, LinearAdapter],
        vectors: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """Runs linears of one group and returns their outputs side by side, `[B, T, out]`."""
        group = cast("ParallelLinears", self.group_of[names[0]])
        adapter = cast("DepthAdapter | None", lora.get(group.key))
        y = group(names, x.reshape(-1, x.shape[-1]), adapter, vectors)
        return y.view(*x.shape[:-1], y.shape[-1])

    def split(self, names: tuple[str, ...], joined: Tensor) -> tuple[Tensor, ...]:
        """Returns the outputs of each linear, as views."""
        sizes = cast("ParallelLinears", self.group_of[names[0]]).sizes
        return joined.split([sizes[name] for name in names], dim=-1)

    def normalise(self, name: str, x: Tensor, vectors: Mapping[str, Tensor] | None) -> Tensor:
        """Runs a norm, with the depth's own weights where it has some; returns `x` for a norm that the part lacks."""
        norm = self.norms.get(name)
        if norm is None:
            return x
        if vectors is None:
            return norm(x)
        return norm(x, vectors[f"{name}.weight"], vectors.get(f"{name}.bias"))


def _length(part: slice, whole: int) -> int:
    return whole if part.start is None else part.stop - part.start


def _loader(parameter: Any, *key: Any) -> Any:
    """Returns a function that gives a tensor to vLLM's loader of a parameter."""
    return lambda tensor: parameter.weight_loader(parameter, tensor, *key)
