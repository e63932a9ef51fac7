"""The picture of a stack: source layers, the parts stored from them, and the depths that run the parts."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from refold.blueprint.schema import POOLS, Blueprint, DepthSpec, MixerPart, Part, Pool
from refold.pages.palette import SERIES
from refold.report.chart import ChartText, heading, style_of
from refold.report.drawing import SMALL_SIZE, Box, Drawing, Item, Stroke, Words, shorten, text_width

SOURCE_WIDTH, SOURCE_GAP = 26.0, 22.0
PART_WIDTH, PART_GAP = 106.0, 24.0
DEPTH_WIDTH = 114.0
EDGE = 4.0
KIND_WIDTH = 5.0
"""Width of the bar at a mixer that is not the source's attention; each kind has its colour."""
PITCH, HEIGHT = 36.0, 30.0
"""Distance of two depths, and height of a box."""
LEFT_SOURCE = EDGE
LEFT_PART = LEFT_SOURCE + SOURCE_WIDTH + SOURCE_GAP
DEPTHS = LEFT_PART + PART_WIDTH + PART_GAP
RIGHT_PART = DEPTHS + DEPTH_WIDTH + PART_GAP
RIGHT_SOURCE = RIGHT_PART + PART_WIDTH + SOURCE_GAP
WIDTH = RIGHT_SOURCE + SOURCE_WIDTH + EDGE
TOP = 62.0


def draw_stack(text: ChartText, blueprint: Blueprint, num_layers: int) -> Drawing:
    """Draws a blueprint: mixers at the left of the depths, MLPs at their right, source layers at both sides.

    Args:
        text: Name, title and description.
        blueprint: The stack.
        num_layers: Number of layers of the source.
    """
    items: list[Item] = [heading(text, WIDTH)]
    heads = ((LEFT_SOURCE + SOURCE_WIDTH / 2, "source"), (LEFT_PART + PART_WIDTH / 2, "mixers"))
    heads += ((DEPTHS + DEPTH_WIDTH / 2, "depths"), (RIGHT_PART + PART_WIDTH / 2, "MLPs"))
    items += [Words(max(x, 20.0), TOP - 14, name, SMALL_SIZE, "middle", "quiet") for x, name in heads]
    items.append(Words(WIDTH - 2, TOP - 14, "source", SMALL_SIZE, "end", "quiet"))
    rows = max(blueprint.num_depths, 1)
    span = rows * PITCH
    layers = {layer: TOP + (layer + 0.5) * span / num_layers for layer in range(num_layers)}
    depths = [TOP + (index + 0.5) * PITCH for index in range(rows)]
    boxes: list[Item] = []
    for pool, side in zip(POOLS, (-1, 1), strict=True):
        places = part_places(blueprint, pool, depths)
        lines, drawn = _pool(blueprint, pool, side, places, (layers, depths))
        items += lines
        boxes += drawn
    items += boxes
    for index, y in enumerate(depths):
        items += _depth(blueprint, index, y)
    return Drawing(text.name, text.title, text.about, WIDTH, TOP + span + 6, tuple(items))


def part_places(blueprint: Blueprint, pool: Pool, depths: Sequence[float]) -> list[float]:
    """Returns the middle of each stored part: that of its depths, pushed down from the part above it."""
    wanted = []
    for part in range(len(blueprint.pool(pool))):
        users = blueprint.users(pool, part)
        wanted.append((sum(depths[user] for user in users) / len(users), part))
    wanted.sort()
    places, free = [0.0] * len(wanted), depths[0]
    for place, part in wanted:
        places[part] = max(place, free)
        free = places[part] + PITCH
    # Pushed up again where the last parts went beyond the last depth.
    limit = depths[-1]
    for _, part in reversed(wanted):
        places[part] = min(places[part], limit)
        limit = places[part] - PITCH
    return places


def _pool(
    blueprint: Blueprint,
    pool: Pool,
    side: int,
    places: Sequence[float],
    rows: tuple[Mapping[int, float], Sequence[float]],
) -> tuple[list[Item], list[Item]]:
    """Returns the lines of one pool, and the boxes above them."""
    layers, depths = rows
    left = LEFT_PART if side < 0 else RIGHT_PART
    outer, inner = (left, left + PART_WIDTH) if side < 0 else (left + PART_WIDTH, left)
    source = LEFT_SOURCE + SOURCE_WIDTH if side < 0 else RIGHT_SOURCE
    depth_edge = DEPTHS if side < 0 else DEPTHS + DEPTH_WIDTH
    lines: list[Item] = []
    boxes: list[Item] = []
    read: set[int] = set()
    kinds = sorted({part.mixer.type for part in blueprint.mixers if not part.mixer.is_native})
    for number, (part, y) in enumerate(zip(blueprint.pool(pool), places, strict=True)):
        users = blueprint.users(pool, number)
        colour, _, dash = style_of(number) if len(users) > 1 else ("quiet", "circle", ())
        read |= set(part.sources)
        lines += [Stroke(((source, layers[layer]), (outer, y)), colour, 1.2, dash) for layer in part.sources]
        lines += [Stroke(((inner, y), (depth_edge, depths[user])), colour, 1.6, dash) for user in users]
        edge = colour if len(users) > 1 else "ink"
        name, about = describe_part(blueprint, pool, number)
        boxes.append(Box(left, y - HEIGHT / 2, PART_WIDTH, HEIGHT, "box", edge, tip=f"{name}: {about}"))
        if isinstance(part, MixerPart) and not part.mixer.is_native:
            boxes.append(
                Box(left, y - HEIGHT / 2, KIND_WIDTH, HEIGHT, SERIES[kinds.index(part.mixer.type) % len(SERIES)])
            )
        boxes += _two_lines(left + PART_WIDTH / 2, y, name, about, PART_WIDTH - 3)
    boxes += _source_boxes(layers, read, side)
    return lines, boxes


def _source_boxes(layers: Mapping[int, float], read: set[int], side: int) -> Iterator[Item]:
    left = LEFT_SOURCE if side < 0 else RIGHT_SOURCE
    pitch = (layers[1] - layers[0]) if len(layers) > 1 else PITCH
    height = min(18.0, max(pitch - 2, 3.0))
    for layer, y in layers.items():
        used = layer in read
        tip = f"source layer {layer}: {'read' if used else 'not read'}"
        dash = () if used else (2.0, 2.0)
        yield Box(left, y - height / 2, SOURCE_WIDTH, height, "box" if used else None, "quiet", dash, tip)
        if pitch >= 12 or layer % 2 == 0:
            middle = left + SOURCE_WIDTH / 2
            yield Words(middle, y + 3.5, str(layer), SMALL_SIZE - 1, "middle", "ink" if used else "quiet")


def _depth(blueprint: Blueprint, index: int, y: float) -> Iterator[Item]:
    depth = blueprint.depths[index]
    about = ", ".join(describe_depth(depth)) or "nothing of its own"
    edge, dash = ("quiet", (2.0, 2.0)) if about == "dropped" else ("ink", ())
    yield Box(DEPTHS, y - HEIGHT / 2, DEPTH_WIDTH, HEIGHT, "paper", edge, dash, f"depth {index}: {about}")
    shown = ", ".join(describe_depth(depth))
    name = f"depth {index}" if depth.source == index else f"depth {index} for {depth.source}"
    yield from _two_lines(DEPTHS + DEPTH_WIDTH / 2, y, name, shown, DEPTH_WIDTH - 6)
    if depth.exit is not None:
        # A bar below the depth: tokens may leave here.
        yield Stroke(((DEPTHS - 3, y + HEIGHT / 2 + 2), (DEPTHS + DEPTH_WIDTH + 3, y + HEIGHT / 2 + 2)), "c1", 3.0)


def _two_lines(x: float, y: float, first: str, second: str, width: float) -> Iterator[Item]:
    size = SMALL_SIZE if text_width(first, SMALL_SIZE) <= width else SMALL_SIZE - 1
    if not second:
        yield Words(x, y + 3.5, shorten(first, width, size), size, "middle")
        return
    yield Words(x, y - 3, shorten(first, width, size), size, "middle")
    yield Words(x, y + 9.5, shorten(second, width, SMALL_SIZE - 1), SMALL_SIZE - 1, "middle", "quiet")


def describe_part(blueprint: Blueprint, pool: Pool, number: int) -> tuple[str, str]:
    """Returns the name of a stored part, such as `2 attention`, and its form, such as `rank 64, int4`."""
    part = blueprint.pool(pool)[number]
    kind = blueprint.mixers[number].mixer.type.replace("_", " ") if pool == "mixer" else "MLP"
    return f"{number} {kind}", ", ".join(_forms(part)) or ("" if part.sources else "fresh")


def _forms(part: Part) -> Iterator[str]:
    if part.factors:
        yield _span("rank", part.factors.values())
    if part.bases:
        yield _span("basis", part.bases.values())
    if part.quantised:
        yield "/".join(sorted(set(part.quantised.values())))
    heads, neurons = getattr(part, "num_key_value_heads", None), getattr(part, "intermediate_size", None)
    if heads is not None:
        yield f"{heads} KV heads"
    if neurons is not None:
        yield f"{neurons} neurons"
    if not part.sources:
        yield "fresh"


def describe_depth(depth: DepthSpec) -> Iterator[str]:
    """Yields the things that a depth owns or lacks, in words."""
    if depth.mixer is None and depth.mlp is None:
        yield "dropped"
    elif depth.mixer is None or depth.mlp is None:
        yield "no mixer" if depth.mixer is None else "no MLP"
    if depth.ranks:
        yield _span("LoRA", depth.ranks.values())
    if depth.exit is not None:
        yield "exit"
    if depth.kv:
        yield "keys of " + ", ".join(str(read.depth) for read in depth.kv)
    if depth.prefix:
        yield f"prefix {depth.prefix}"
    if depth.window is not None:
        yield f"window {depth.window}"
    if depth.gain == "own":
        yield "gain"
    if depth.vectors == "own":
        yield "own norms"


def _span(name: str, numbers: Collection[int]) -> str:
    least, greatest = min(numbers), max(numbers)
    return f"{name} {least}" if least == greatest else f"{name} {least}-{greatest}"
