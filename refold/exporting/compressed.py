"""Linears of a stock folder as compressed-tensors packs them: schemes, sizes and config; torch-free."""

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from refold.blueprint.integers import SCHEMES, Scheme
from refold.blueprint.source_tensors import SourceTensor
from refold.errors import ExportError
from refold.exporting.target import ExportOptions
from refold.suggest import must_be_one_of

FLOAT = "float"
PACKED = tuple(name for name, scheme in SCHEMES.items() if scheme.bits in (4, 8))
"""Schemes for whose packed linears engines have kernels, which take 4 and 8 bits. The four values of `int2` lie between
integers, which no config can say."""
WEIGHT = ".weight"


def choose_linears(tensors: Mapping[str, SourceTensor], options: ExportOptions) -> dict[str, str]:
    """Returns the scheme of each linear of a stock model that is stored as integers, by the name of its weight.

    Args:
        tensors: All tensors of the stock model.
        options: With `quantise`, and in `keep` the scheme or `float` by pattern of names.

    Raises:
        ExportError: A pattern fits no linear, a scheme is unknown, or a scheme does not fit a linear's width.
    """
    if options.quantise is None:
        return {}
    linears = [name for name, each in tensors.items() if each.layer is not None and len(each.shape) == 2]
    found = dict.fromkeys(linears, options.quantise)
    for pattern, format in options.keep.items():
        if format != FLOAT and format not in PACKED:
            raise ExportError(f"export: keep.{pattern}: {must_be_one_of(format, (*PACKED, FLOAT))}")
        if pattern in ("embeddings", "head"):
            if format != FLOAT:
                raise ExportError(
                    f"export: keep.{pattern}: float is required by compressed-tensors, which packs linears (got "
                    f"{format}); omit it"
                )
            continue
        fitting = [name for name in linears if fits(name, pattern)]
        if not fitting:
            raise ExportError(f"export: keep.{pattern}: a linear or a pattern of linears is required (none fits)")
        found |= dict.fromkeys(fitting, format)
    found = {name: scheme for name, scheme in found.items() if scheme != FLOAT}
    for name, scheme in found.items():
        columns, group = tensors[name].shape[1], SCHEMES[scheme].group
        if group is not None and columns % group:
            raise ExportError(
                f"export: {name}: inputs in multiples of {group} are required by {scheme} in compressed-tensors (got "
                f"{columns}); keep it as float or int8: --keep {name.split('.')[-2]}=int8"
            )
    return found


def fits(name: str, pattern: str) -> bool:
    """Says whether a weight has a name, or the name of its linear, or fits a pattern."""
    return pattern in (name, name.removesuffix(WEIGHT), name.split(".")[-2]) or fnmatchcase(name, pattern)


def quantization_config(schemes: Mapping[str, str], tensors: Mapping[str, SourceTensor]) -> dict[str, Any]:
    """Returns the `quantization_config` of `config.json`.

    Args:
        schemes: From `choose_linears`.
        tensors: All tensors of the stock model.
    """
    common = max(dict.fromkeys(schemes.values()), key=list(schemes.values()).count)
    groups: list[dict[str, Any]] = []
    for scheme in dict.fromkeys(schemes.values()):
        modules = [name.removesuffix(WEIGHT) for name, each in schemes.items() if each == scheme]
        targets = ["Linear"] if scheme == common else [f"re:^{re.escape(module)}$" for module in modules]
        groups.append({"targets": targets, "weights": _arguments(SCHEMES[scheme])})
    # A module takes the first group whose target it fits, so names stand before the class.
    groups.sort(key=lambda group: group["targets"] == ["Linear"])
    floats = [
        name.removesuffix(WEIGHT)
        for name, each in tensors.items()
        if each.layer is not None and len(each.shape) == 2 and name not in schemes
    ]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        "ignore": ["lm_head", *floats],
    }


def _arguments(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": not scheme.has_zero_point,
        "strategy": "channel" if scheme.group is None else "group",
        "group_size": scheme.group,
        "dynamic": False,
    }
