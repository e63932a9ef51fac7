"""The objective `exits`: each early exit learns from the final output of the same pass, or from the text."""

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from refold.errors import HealError
from refold.healing.activations import Want
from refold.healing.objectives.objective import Loss, Objective, Step
from refold.modeling.model import RefoldForCausalLM
from refold.recipe import objectives as specs
from refold.scoring.agreement import likeliest_tokens
from refold.scoring.chunked import ChunkedLoss, Objectives, chunked_loss
from refold.scoring.head import Predictions
from refold.scoring.predict import ExitPredictions


class Exits(Objective[specs.ExitsOptions]):
    """`c_n CE(final) + sum over exits c_i L_i + gate_weight * sum over gates BCE_i` (arXiv 2410.20672, section 3.7).

    L_i is `KL(final || exit i)` with the final distribution detached, or the cross-entropy with the text. `aggressive`
    coefficients are 1 for the final output and the same small one for each exit; `weighted` ones are i / sum i over
    exits and final output, top to bottom. A gate learns whether the likeliest token of its exit is that of the final
    output. Both are detached, so this loss trains only the gate.
    """

    student_wants = frozenset[Want]({"exits"})
    needs_fold = True

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        assert isinstance(student, RefoldForCausalLM)
        if not student.model.exit_depths:
            raise HealError(
                "objective exits: a model with exits is required (its blueprint has none); convert the source again "
                "with an `exits` section"
            )
        *coefficients, final = self._coefficients(len(student.model.exit_depths))
        parts = [student.model.exit_parts(index) for index in student.model.exit_depths]
        has_gates = any(part is not None and part.gate is not None for part in parts)
        if not any(coefficients) and not final and not (has_gates and self.options.gate_weight):
            raise HealError(
                "objective exits: something to learn is required (coefficient and cross_entropy are 0, and there is no "
                "gate to train); raise one of them"
            )

    def loss(self, step: Step) -> Loss:
        assert step.student is not None
        final, exits = step.student.predictions, step.student.exits
        *coefficients, final_coefficient = self._coefficients(len(exits))
        totals: list[Tensor] = []
        means: dict[str, Tensor] = {}
        if final_coefficient:
            found = chunked_loss(final, step.labels, Objectives(final_coefficient), num_tokens=step.num_tokens)
            totals.append(found.total)
            means |= found.means
        for left, coefficient in zip(exits, coefficients, strict=True):
            if coefficient:
                found = self._exit_loss(step, left.predictions, final, coefficient)
                totals.append(found.total)
                means |= {f"exit_{left.depths}_{name}": mean for name, mean in found.means.items()}
        if self.options.gate_weight:
            for name, value in _gate_losses(step, final, exits).items():
                means[name] = value.detach()
                if name.startswith("gate"):
                    totals.append(self.options.gate_weight * value)
        return Loss(torch.stack(totals).sum(), means)

    def _coefficients(self, num_exits: int) -> list[float]:
        """Returns the coefficient of each exit, top to bottom, and then that of the final output."""
        scale = self.options.cross_entropy
        if self.options.weights == "aggressive":
            return [*[self.options.coefficient] * num_exits, scale]
        total = sum(range(1, num_exits + 2))
        return [*(place / total for place in range(1, num_exits + 1)), scale * (num_exits + 1) / total]

    def _exit_loss(self, step: Step, exit_: Predictions, final: Predictions, coefficient: float) -> ChunkedLoss:
        if self.options.target == "labels":
            return chunked_loss(exit_, step.labels, Objectives(coefficient), num_tokens=step.num_tokens)
        parts = Objectives(0.0, {"forward_kl": coefficient})
        return chunked_loss(exit_, step.labels, parts, teacher=final, num_tokens=step.num_tokens)


def _gate_losses(step: Step, final: Predictions, exits: list[ExitPredictions]) -> dict[str, Tensor]:
    """Returns the loss of each gate as `gate_<depths>`, and the mean of its target as `exit_<depths>_agreement`."""
    gated = [left for left in exits if left.gate is not None]
    if not gated:
        return {}
    found: dict[str, Tensor] = {}
    expected = likeliest_tokens(final, step.labels)
    scored = step.labels != -100
    for left in gated:
        assert left.gate is not None
        agrees = _agreement(left.predictions, step.labels, expected)[scored]
        gate = left.gate[scored]
        gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
        loss = F.binary_cross_entropy_with_logits(gate, agrees.to(gate.dtype), reduction="sum")
        found[f"gate_{left.depths}"] = loss / step.num_tokens
        found[f"exit_{left.depths}_agreement"] = agrees.to(gate.dtype).sum() / step.num_tokens
    return found


def _agreement(predictions: Predictions, labels: Int64[Tensor, "B T"], expected: Int64[Tensor, "B T"]) -> Tensor:
    return likeliest_tokens(predictions, labels) == expected
