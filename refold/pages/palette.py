"""Colours of pages and pictures by their role, for light and for dark screens."""

from collections.abc import Mapping

LIGHT: Mapping[str, str] = {
    "ink": "#111111",
    "quiet": "#555555",
    "faint": "#cccccc",
    "paper": "#ffffff",
    "box": "#f4f4f4",
    "link": "#00558c",
    "c0": "#0072b2",
    "c1": "#b84e00",
    "c2": "#00775a",
    "c3": "#a8457d",
    "c4": "#866000",
    "c5": "#4f5bc4",
    "shallow": "#e4f0fa",
    "deep": "#7fb2dd",
}
DARK: Mapping[str, str] = {
    "ink": "#e8e8e8",
    "quiet": "#b4bac2",
    "faint": "#444b55",
    "paper": "#15181c",
    "box": "#1f242b",
    "link": "#7cc3f2",
    "c0": "#56b4e9",
    "c1": "#ff8a3d",
    "c2": "#35c79a",
    "c3": "#e29fc6",
    "c4": "#f0b840",
    "c5": "#a9b2ff",
    "shallow": "#1c2c3a",
    "deep": "#2a6496",
}
SERIES = ("c0", "c1", "c2", "c3", "c4", "c5")
"""Roles of series of data: Okabe and Ito's hues, dark or light enough for text."""
RAMP = ("shallow", "deep")
"""Roles of the ends of a ramp of one hue, on which text in `ink` is legible. Its steps differ in lightness, so that
colour-blind readers see them too."""


def contrast(one: str, two: str) -> float:
    """Returns the contrast ratio of two colours `#rrggbb`, from 1 to 21 (WCAG 2.2)."""
    light, dark = sorted((_luminance(one), _luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    linear = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels)
    return sum(weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
