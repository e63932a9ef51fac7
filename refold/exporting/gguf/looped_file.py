"""Contents of `nanbeige` files, whose stored layers run several times: strict folds of sources with Llama's layout."""

from refold.blueprint.schema import Blueprint
from refold.exporting.cycle import cycle_obstacles, find_cycle
from refold.exporting.gguf.blocks import block_tensors, layout_obstacles, outside_tensors, size_fields
from refold.exporting.gguf.contents import GgufContents
from refold.exporting.gguf.layouts import GgufLayout
from refold.exporting.gguf.rotary_fields import rotary_obstacles
from refold.exporting.gguf.unrolled_file import file_ropes, finished
from refold.exporting.target import Obstacle
from refold.exporting.unrolled import dense_arch, dense_obstacles

NANBEIGE = GgufLayout("nanbeige", turns_heads=True, has_rope_factors=True)
MOST_LAYERS = 512
"""Number of layers, loops counted, that llama.cpp has room for."""


def looped_obstacles(blueprint: Blueprint) -> list[Obstacle]:
    """Returns the reasons why `nanbeige` cannot hold a stack with its sharing."""
    found = dense_obstacles(blueprint)
    if found:
        return found
    arch = dense_arch(blueprint)
    found = cycle_obstacles(blueprint) + layout_obstacles(arch, NANBEIGE)
    ropes = file_ropes(arch, NANBEIGE)
    if len(ropes) > 1:
        found.append(Obstacle("one rotary embedding in all layers", f"{len(ropes)} of them", ""))
    for rope in ropes:
        found += rotary_obstacles(rope, NANBEIGE.has_rope_factors)
    if blueprint.num_depths > MOST_LAYERS:
        found.append(Obstacle(f"at most {MOST_LAYERS} layers, loops counted", f"{blueprint.num_depths}", ""))
    return found


def looped_contents(blueprint: Blueprint) -> GgufContents:
    """Returns the contents of a `nanbeige` file: each stored layer once."""
    arch, cycle = dense_arch(blueprint), find_cycle(blueprint)
    tensors = [*outside_tensors(arch, NANBEIGE)]
    for block, depth in enumerate(cycle.depths):
        tensors += block_tensors(arch, NANBEIGE, block, depth, tuple(NANBEIGE.tensors))
    fields = size_fields(arch, cycle.num_layers, 0) | {
        "{arch}.num_loops": cycle.num_loops,
        # The final norm runs once, behind the last loop.
        "{arch}.skip_loop_final_norm": True,
    }
    return finished(arch, NANBEIGE, tensors, fields)
