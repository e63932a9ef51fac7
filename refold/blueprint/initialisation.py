"""What the converter has to know besides the blueprint: how weights and LoRAs start."""

from typing import Literal

from refold.families.arch import Frozen

ErrorMetric = Literal["none", "activations", "fisher"]
"""By what an error E of a linear's weight is measured: `none`, its entries, |E|^2; `activations`, its outputs on
calibration text, |E S|^2 with S S^T the second moment of the inputs (SVD-LLM, arXiv 2403.07378); `fisher`, what they
do to the loss: outputs are weighted by the second moment of its gradients as well (the Kronecker-factored Fisher matrix
of arXiv 1503.05671)."""

Align = Literal["none", "permutation", "rotation", "both"]
"""By which symmetries tied layers are brought into a common frame: orders of neurons and heads, axes of values."""


class Initialisation(Frozen):
    """How the tensors of a target start. With the blueprint it says everything about a conversion."""

    weights: Literal["source", "fresh"] = "source"
    """`fresh`: every tensor of the target starts fresh, embeddings and head included."""
    lora: Literal["svd", "zero", "joint"] | None = None
    """How LoRAs start; None: there are none."""
    svd: Literal["auto", "exact"] = "auto"
    weight: ErrorMetric = "none"
    """What the error of a fitted linear is weighted by."""
    align: Align = "none"
    """How tied layers are brought into a common frame before anything is made of them."""
    scale: Literal["none", "norm"] = "none"
    """`norm`: the mean of tied linears has the mean of their Frobenius norms."""
    transfers: tuple[tuple[str, ...] | None, ...] = ()
    """For each stored mixer what it takes over from its sources besides norms, by name; None, or no entry: all."""
    seed: int = 0

    def transfers_of(self, part: int) -> tuple[str, ...] | None:
        """Returns what a stored mixer takes over; None: all."""
        return self.transfers[part] if part < len(self.transfers) else None
