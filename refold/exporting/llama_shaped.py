"""Models with Llama's layers and no biases, which formats of several engines can hold; torch-free."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from refold.blueprint.schema import Blueprint
from refold.blueprint.source_tensors import canonical_tensors
from refold.exporting.gguf.blocks import layout_obstacles
from refold.exporting.gguf.layouts import GgufLayout
from refold.exporting.gguf.unrolled_file import file_ropes
from refold.exporting.target import Obstacle
from refold.exporting.unrolled import dense_arch, dense_obstacles
from refold.families import llama
from refold.families.arch import ArchSpec
from refold.mixers.spec import Shape


class StoredLayer(NamedTuple):
    """A layer of an exported folder: the depth whose weights it has, its parts, and its own sizes."""

    depth: int
    pools: tuple[str, ...] = ("mixer", "mlp")
    arch: ArchSpec | None = None
    """The architecture with the sizes of the layer; None: the sizes of all layers."""


class StoredTensor(NamedTuple):
    """A tensor of an exported folder: a canonical weight at a depth."""

    canonical: str
    depth: int | None
    shape: Shape


def llama_obstacles(blueprint: Blueprint, name: str) -> list[Obstacle]:
    """Returns the reasons why a model's layers are not Llama's, for the format `name`."""
    found = dense_obstacles(blueprint)
    if found:
        return found
    arch = dense_arch(blueprint)
    layout = GgufLayout(name, biases=frozenset())
    found = layout_obstacles(arch, layout)
    if len(file_ropes(arch, layout)) > 1:
        found.append(Obstacle("one rotary embedding in all layers", "several", ""))
    windows = [layer.window for layer in arch.layers if layer.window is not None]
    if min(windows, default=arch.max_position_embeddings) < arch.max_position_embeddings:
        found.append(Obstacle(f"attention without windows, as {name} has", f"a window of {min(windows)}", ""))
    return found


def stored_tensors(arch: ArchSpec, layers: Sequence[StoredLayer]) -> Iterator[tuple[str, StoredTensor]]:
    """Yields name and content of each tensor of a folder with Llama's tensor names."""
    shapes = canonical_tensors(arch)
    for rule in llama.RULES:
        (canonical,) = rule.pieces
        if canonical not in shapes:
            continue
        if not rule.per_layer:
            yield rule.source, StoredTensor(canonical, None, shapes[canonical])
            continue
        for index, layer in enumerate(layers):
            if canonical.partition(".")[0] in layer.pools:
                shape = shapes[canonical] if layer.arch is None else canonical_tensors(layer.arch)[canonical]
                yield rule.source.format(layer=index), StoredTensor(canonical, layer.depth, shape)


def llama_fields(arch: ArchSpec, num_layers: int) -> dict[str, Any]:
    """Returns the fields of a config with Llama's names, rotary embedding in the spellings of transformers 4 and 5."""
    one = arch.layers[:1] if arch.layers[0].rope is not None else arch.layers[1:2]
    fields = llama.write_config(arch.model_copy(update={"layers": one * num_layers}))
    parameters: Mapping[str, Any] = fields["rope_parameters"]
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return {
        **fields,
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": None if parameters["rope_type"] == "default" else scaling,
    }
