"""Initialisation of a target: the settings that the converter needs besides the blueprint."""

from typing import Literal

from refold.families.arch import Frozen

ErrorMetric = Literal["none", "activations", "fisher"]
"""The error metric for an error E of a linear's weight. `none`: the squared entries, |E|^2. `activations`: the squared
outputs on calibration text, |E S|^2 with S S^T the second moment of the inputs (SVD-LLM, arXiv 2403.07378). `fisher`:
the effect on the loss, for which outputs are weighted by the second moment of their gradients too (the
Kronecker-factored Fisher matrix of arXiv 1503.05671)."""

Align = Literal["none", "permutation", "rotation", "both"]
"""Symmetries by which tied layers are aligned: `permutation` of neurons and heads, `rotation` of each head's values."""


class Initialisation(Frozen):
    """Initialisation of all tensors of a target. Blueprint and initialisation together define a conversion."""

    weights: Literal["source", "fresh"] = "source"
    """`fresh`: every tensor of the target is initialised with new values, embeddings and head included."""
    lora: Literal["svd", "zero", "joint"] | None = None
    """Initialisation of LoRAs; None: the target has none."""
    svd: Literal["auto", "exact"] = "auto"
    weight: ErrorMetric = "none"
    """The error metric of fitted linears."""
    align: Align = "none"
    """Alignment of tied layers before they are averaged or fitted."""
    scale: Literal["none", "norm"] = "none"
    """`norm`: the mean of tied linears is scaled to the mean of their Frobenius norms."""
    transfers: tuple[tuple[str, ...] | None, ...] = ()
    """For each stored mixer the names of the linears taken over from its sources; None, or no entry: all."""
    seed: int = 0

    def transfers_of(self, part: int) -> tuple[str, ...] | None:
        """Returns the names of the linears that a stored mixer takes over; None: all."""
        return self.transfers[part] if part < len(self.transfers) else None
