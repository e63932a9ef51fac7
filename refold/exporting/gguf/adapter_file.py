"""LoRAs of a model as a GGUF adapter, and the base that it goes with: the unrolled stack without LoRAs; torch-free."""

from collections.abc import Iterator

from refold.blueprint.part_sizes import widest_arch
from refold.blueprint.schema import Blueprint, linear_pools
from refold.blueprint.source_tensors import canonical_tensors
from refold.exporting.gguf.blocks import query_factor, scaled_stem
from refold.exporting.gguf.contents import GgufContents, GgufTensor, WeightPiece
from refold.exporting.gguf.layouts import GgufLayout, find_layout
from refold.exporting.gguf.unrolled_file import DECI, pruned_contents, unrolled_contents, unrolled_obstacles
from refold.exporting.target import Obstacle
from refold.exporting.unrolled import kept_depths, width_obstacles, without_adapters


def adapter_obstacles(blueprint: Blueprint) -> list[Obstacle]:
    """Returns the reasons why a model is no base with LoRAs in llama.cpp."""
    found = []
    if not any(depth.ranks for depth in blueprint.depths):
        found.append(Obstacle("LoRAs at some depth", "there are none", "relax"))
    for index, depth in enumerate(blueprint.depths):
        if depth.gain == "own":
            found.append(Obstacle("LoRAs without gains", f"depth {index} has gains", "relax.gain=tied"))
            break
    if any(rank == 0 for part in (*blueprint.mixers, *blueprint.mlps) for rank in part.factors.values()):
        got = "LoRAs that replace a linear"
        found.append(Obstacle("a stored weight under each LoRA", got, "factor with a rank above 0"))
    found += width_obstacles(blueprint)
    if found:
        return found
    layout = _layout(blueprint)
    if layout is None:
        return [Obstacle("a family that llama.cpp has", blueprint.arch.family, "")]
    if any(len(stems) > 1 for stems in layout.tensors.values()):
        found.append(Obstacle("linears that are not packed", f"{layout.name} packs queries, keys and values", ""))
    return found + unrolled_obstacles(without_adapters(blueprint), layout)


def base_contents(blueprint: Blueprint) -> GgufContents:
    """Returns the contents of the base: each depth as a layer, without LoRAs."""
    base, layout = without_adapters(blueprint), _layout(blueprint)
    assert layout is not None
    return pruned_contents(base) if layout is DECI else unrolled_contents(base, layout)


def adapter_contents(blueprint: Blueprint) -> GgufContents:
    """Returns the contents of the adapter."""
    layout = _layout(blueprint)
    assert layout is not None
    ranks = {rank for index in kept_depths(blueprint) for rank in blueprint.depths[index].ranks.values()}
    fields = {
        "general.type": "adapter",
        "adapter.type": "lora",
        # llama.cpp scales by alpha / rank, and by 1 for alpha 0.
        "adapter.lora.alpha": float(min(ranks)) if len(ranks) == 1 else 0.0,
    }
    return GgufContents(layout.name, fields, tuple(_tensors(blueprint, layout)))


def _tensors(blueprint: Blueprint, layout: GgufLayout) -> Iterator[GgufTensor]:
    arch = widest_arch(blueprint)
    shapes = canonical_tensors(arch)
    names = {stem: name for name, (stem, *_) in layout.tensors.items()}
    heads = {"q_proj": arch.num_attention_heads, "k_proj": arch.num_key_value_heads} if layout.turns_heads else {}
    factors = {scaled_stem(arch): query_factor(arch, layout, len(kept_depths(blueprint)))}
    for block, index in enumerate(kept_depths(blueprint)):
        pools, depth = linear_pools(blueprint, index), blueprint.depths[index]
        for linear, rank in depth.ranks.items():
            stem = f"{pools[linear]}.{linear}"
            rows, columns = shapes[f"{stem}.weight"]
            name = f"blk.{block}.{names[stem]}.weight"
            source = f"depths.{index}.lora.{linear}"
            yield GgufTensor(f"{name}.lora_a", (rank, columns), (WeightPiece(f"{source}.a"),))
            turned = WeightPiece(f"{source}.b", factor=factors.get(stem, 1.0), rotary_heads=heads.get(linear, 0))
            yield GgufTensor(f"{name}.lora_b", (rows, rank), (turned,))


def _layout(blueprint: Blueprint) -> GgufLayout | None:
    if any((depth.mixer is None) != (depth.mlp is None) for depth in blueprint.depths) and not unrolled_obstacles(
        without_adapters(blueprint), DECI
    ):
        return DECI
    return find_layout(blueprint.arch.family)
