"""What the converter has to know besides the blueprint: how weights and LoRAs start."""

from typing import Literal

from refold.families.arch import Frozen


class Starts(Frozen):
    """How the tensors of a target start. With the blueprint it says everything about a conversion."""

    weights: Literal["source", "fresh"] = "source"
    """`fresh`: every tensor of the target starts fresh, embeddings and head included."""
    lora: Literal["svd", "zero", "joint"] | None = None
    """How LoRAs start; None: there are none."""
    svd: Literal["auto", "exact"] = "auto"
    transfers: tuple[tuple[str, ...] | None, ...] = ()
    """For each stored mixer what it takes over from its sources besides norms, by name; None, or no entry: all."""
    seed: int = 0

    def transfers_of(self, part: int) -> tuple[str, ...] | None:
        """Returns what a stored mixer takes over; None: all."""
        return self.transfers[part] if part < len(self.transfers) else None
