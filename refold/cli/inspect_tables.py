"""Tables that describe a folded model."""

from refold.blueprint.owned.registry import OWNED
from refold.blueprint.schema import Blueprint, DepthSpec, Pool
from refold.cli.plan_tables import print_approximation
from refold.cli.show import format_bytes, format_count, print_table
from refold.conversion.inspect import Inspection


def print_inspection(found: Inspection) -> None:
    """Prints the cost of model and source, the stack depth by depth, kept energy and history."""
    source, target = found.cost.source, found.cost.target
    size, source_size = found.blueprint.arch.vocab_size, found.source_vocabulary
    rows = [
        *(() if source_size is None else (("tokens", f"{source_size:,}", f"{size:,}"),)),
        ("parameters", format_count(source.parameters), format_count(target.parameters)),
        ("weight bytes", format_bytes(source.weight_bytes), format_bytes(target.weight_bytes)),
        *(
            (f"cache + state at {each.context:,}", format_bytes(each.source), format_bytes(each.target))
            for each in found.memory.cache_and_state
        ),
        ("FLOPs per token", format_count(source.flops_per_token), format_count(target.flops_per_token)),
    ]
    print_table(("", "source", "folded"), rows, f"{found.path} ({found.blueprint.arch.family}, {found.dtype})")
    print(f"less memory than its source (weights, cache and state): {found.memory.describe()}")
    print()
    stack, num_heads = [], found.blueprint.arch.num_key_value_heads
    for index, depth in enumerate(found.blueprint.depths):
        kept = [value for name, value in found.kept_energy.items() if name.startswith(f"depths.{index}.")]
        stack.append(
            (
                str(index),
                str(depth.source),
                _part(found.blueprint, "mixer", depth.mixer),
                _part(found.blueprint, "mlp", depth.mlp),
                _owned(found.blueprint, index, "rank"),
                _owned(found.blueprint, index, "vectors"),
                f"{min(kept):.1%}" if kept else "-",
                _keys(depth, num_heads),
                _owned(found.blueprint, index, "exit"),
            )
        )
    print_table(("depth", "layer", "mixer", "mlp", "rank", "vectors", "least kept energy", "keys of", "exit"), stack)
    print("passes of the engine:")
    for told in found.passes:
        print(f"- {told}")
    print_approximation(found.approximation)
    for said in found.notes:
        print(f"- {said}")
    if found.stages:
        print()
        history = [
            (stage["stage"], stage["time"], f"{stage['tokens']:,}", str(stage["seed"]), stage["command"])
            for stage in found.stages
        ]
        print_table(("stage", "time", "tokens", "seed", "command"), history)


def _owned(blueprint: Blueprint, index: int, column: str) -> str:
    """Returns the text of one column for the objects that a depth owns."""
    # In reverse order, so that LoRA ranks, which most recipes have, come first.
    told = [kind.describe(blueprint, index) for kind in reversed(OWNED) if kind.column == column]
    return ", ".join(each for each in told if each) or "-"


def _keys(depth: DepthSpec, num_heads: int) -> str:
    """Returns the depths whose keys and values a depth reads."""
    if depth.mixer is None:
        return "-"
    read = sum(len(each.heads) for each in depth.kv)
    return ", ".join([*(("own",) if read < num_heads else ()), *(each.describe(num_heads) for each in depth.kv)])


def _part(blueprint: Blueprint, pool: Pool, index: int | None) -> str:
    """Returns the index of a stored part, and its number of key-value heads or neurons if it is narrower."""
    if index is None:
        return "dropped"
    size = "num_key_value_heads" if pool == "mixer" else "intermediate_size"
    count = getattr(blueprint.pool(pool)[index], size)
    return str(index) if count is None else f"{index} ({count} {'heads' if pool == 'mixer' else 'neurons'})"
