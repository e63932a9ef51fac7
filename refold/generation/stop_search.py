"""The search for stop strings in text that comes in pieces."""

from collections.abc import Sequence


class StopSearch:
    """Finds the stop string that ends first, and withholds text that may be the beginning of one.

    The result does not depend on the borders of the pieces.

    Args:
        stops: The strings; of two that end at the same place the one that begins first is found.

    Attributes:
        found: The stop string found; None while there is none.
    """

    def __init__(self, stops: Sequence[str]):
        self.found: str | None = None
        self._stops = stops
        self._held = ""

    def add(self, piece: str) -> str:
        """Takes the next piece and returns the text before it or of it that belongs to no stop string; may be empty."""
        text, self._held = self._held + piece, ""
        if self.found is not None:
            return ""
        matches = [(place + len(stop), place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if matches:
            _, place, self.found = min(matches)
            return text[:place]
        place = self._open_place(text)
        self._held = text[place:]
        return text[:place]

    def finish(self) -> str:
        """Returns the withheld text, because no more comes."""
        text, self._held = self._held, ""
        return text

    def _open_place(self, text: str) -> int:
        """Returns the first place from which the text may go on to a stop string; its length if there is none."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for place in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[place:]) for stop in self._stops):
                return place
        return len(text)
