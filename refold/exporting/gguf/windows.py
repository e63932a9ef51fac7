"""Windows of attention in GGUF files: size and period where llama.cpp computes them, a shorter context elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from refold.exporting.gguf.contents import FieldValue
from refold.exporting.gguf.layouts import GgufLayout
from refold.exporting.target import Obstacle
from refold.families.arch import ArchSpec, Layer


@dataclass(frozen=True)
class WindowFields:
    """Keys about windows, the number of tokens up to which the file is exact, and notes."""

    context: int
    fields: dict[str, FieldValue] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_period(layers: Sequence[Layer]) -> int | None:
    """Returns the period p such that exactly the layers i with `i % p < p - 1` have a window; None: there is none.

    1: no layer has a window. 0: all layers have one.
    """
    slides = [layer.window is not None for layer in layers]
    if all(slides):
        return 0
    for period in range(1, len(slides) + 1):
        if all(slides[index] == (index % period < period - 1) for index in range(len(slides))):
            return period
    return None


def window_obstacles(layers: Sequence[Layer], layout: GgufLayout) -> list[Obstacle]:
    """Returns the properties of windows that llama.cpp cannot compute although its architecture has windows."""
    if not layout.window_period:
        return []
    found = []
    if find_period(layers) is None:
        kinds = "".join("w" if layer.window else "f" for layer in layers)
        found.append(
            Obstacle(
                "layers with a window in a fixed period, the last of each period without",
                f"windowed and full layers {kinds}",
                "drop and fold whole periods of layers",
            )
        )
    if len({layer.window for layer in layers if layer.window}) > 1:
        found.append(Obstacle("one size for all windows", "several", ""))
    return found


def window_fields(arch: ArchSpec, layers: Sequence[Layer], layout: GgufLayout) -> WindowFields:
    """Returns the keys for the windows of the layers of a file."""
    context = arch.max_position_embeddings
    windows = [layer.window for layer in layers if layer.window is not None]
    if not layout.window_period:
        narrow = min(windows, default=context)
        if narrow >= context:
            return WindowFields(context)
        note = (
            f"llama.cpp computes no windows for {layout.name}: the context length is {narrow} tokens instead of "
            f"{context}, and the file is exact up to there"
        )
        return WindowFields(narrow, notes=(note,))
    period = find_period(layers)
    assert period is not None
    # A window that no text fills is none; a missing key would mean the default size.
    fields: dict[str, FieldValue] = {"{arch}.attention.sliding_window": min(windows, default=context)}
    if period != layout.window_period:
        fields["{arch}.attention.sliding_window_pattern"] = period
    return WindowFields(context, fields)
