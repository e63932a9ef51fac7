"""What a plan says of stored mixers whose depths look at different distances."""

from refold.blueprint.schema import Blueprint, Depth


def describe_reach(blueprint: Blueprint) -> tuple[str, ...]:
    """Returns a line where depths that share a mixer differ in window or rope; nothing otherwise."""
    tied = [users for part in range(len(blueprint.mixers)) if len(users := blueprint.users("mixer", part)) > 1]
    mixed: list[tuple[int, int]] = []
    for first, *others in tied:
        other = next((each for each in others if _reach(blueprint, each) != _reach(blueprint, first)), None)
        if other is not None:
            mixed.append((first, other))
    if not mixed:
        return ()
    first, other = (blueprint.depths[index] for index in mixed[0])
    is_local = (first.window is None) != (other.window is None)
    who = "a local and a global depth share weights" if is_local else "depths of different reach share weights"
    told = f"depth {mixed[0][0]} {_tell(first)}, depth {mixed[0][1]} {_tell(other)}"
    return (
        f"{who} in {len(mixed)} of {len(tied)} tied mixers ({told}): each depth keeps its own window and rope, the "
        f"weights have to serve both",
    )


def _reach(blueprint: Blueprint, index: int) -> tuple:
    return blueprint.depths[index].window, blueprint.depths[index].rope


def _tell(depth: Depth) -> str:
    seen = "sees all tokens" if depth.window is None else f"sees {depth.window:,} tokens"
    return seen if depth.rope is None else f"{seen} with rope base {depth.rope.theta:,.0f}"
