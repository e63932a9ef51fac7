"""The objective `attention_matrices`: compares token-mixing matrices with the teacher's attention matrices."""

from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from refold.errors import HealError
from refold.healing.activations import Want, attention_layers, folded_depths, require_eager, source_layers
from refold.healing.objectives.alignment import Alignment, teacher_layer_of, teacher_of
from refold.healing.objectives.objective import Step
from refold.modeling.model import RefoldForCausalLM
from refold.nn.mixers.batch import Batch
from refold.nn.mixers.mixer import Mixer
from refold.recipe import objectives as specs


class AttentionMatrices(Alignment[specs.AttentionMatricesOptions]):
    """Matrix orientation (MOHAWK, arXiv 2408.10189, stage 1).

    The mixer of each depth gets the teacher's residual stream before the source layer of the depth, and returns its
    token-mixing matrix. The loss is the squared Frobenius norm of the difference to the attention weights of this
    source layer, per head. MOHAWK takes the square root. The square is a sum over tokens, so it does not depend on
    rows that are not scored, on packing or on micro-batches. Divided by the scored positions it lies between 0 and 2.
    """

    name = "attention_matrices"
    teacher_wants = frozenset[Want]({"streams", "attentions"})
    teacher_attention = "eager"

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        super().check(student, teacher)
        assert isinstance(student, RefoldForCausalLM)
        assert teacher is not None
        require_eager(teacher)
        heads = _num_heads(teacher)
        sources = source_layers(student)
        for depth in self.depths(student):
            reads = folded_depths(student)[depth].spec.kv
            if reads:
                raise HealError(
                    f"objective {self.name}: depths with keys and values of their own are required (depth {depth} "
                    f"reads those of depth {reads[0].depth}); align mixer_outputs instead"
                )
            if folded_depths(student)[depth].spec.prefix:
                raise HealError(
                    f"objective {self.name}: depths that attend to tokens alone are required (depth {depth} has a "
                    f"prefix); align mixer_outputs instead"
                )
            mixer, kind = _mixer(student, depth), _mixer_type(student, depth)
            if mixer.num_matrix_heads is None:
                raise HealError(
                    f"objective {self.name}: mixers that can write their token-mixing matrix down are required (depth "
                    f"{depth}: {kind} cannot); align mixer_outputs instead"
                )
            wanted = heads[sources[depth]]
            if mixer.num_matrix_heads != wanted:
                raise HealError(
                    f"objective {self.name}: as many heads as the teacher's {wanted} are required (depth {depth}: "
                    f"{kind} has {mixer.num_matrix_heads}); align mixer_outputs instead"
                )

    def teacher_layers(self, teacher: PreTrainedModel) -> set[int]:
        return set(_num_heads(teacher))

    def sum_over_depths(
        self, step: Step, student: RefoldForCausalLM, depths: list[int], index: Int64[Tensor, "K"] | None
    ) -> Float[Tensor, ""]:
        teacher, layer_of = teacher_of(step), teacher_layer_of(step, student)
        # In the student's dtype: a teacher may be stored in another.
        streams = {depth: teacher.streams[layer_of[depth]].to(student.dtype) for depth in depths}
        batch = student.model.batch(streams[depths[0]], position_ids=step.position_ids)
        sums = []
        for depth in depths:
            target = _rows(teacher.attentions[layer_of[depth]], index)
            ours = _rows(write_matrix(student, depth, streams[depth], batch), index)
            dtype = torch.promote_types(ours.dtype, torch.float32)
            sums.append((ours.to(dtype) - target.to(dtype)).square().sum() / target.shape[1])
        return sum(sums[1:], sums[0])


def write_matrix(
    model: RefoldForCausalLM, depth: int, hidden_states: Float[Tensor, "B T D"], batch: Batch
) -> Float[Tensor, "B H T T"]:
    """Returns the token-mixing matrix of one depth.

    Args:
        model: a folded model.
        depth: index of a depth whose mixer has a token-mixing matrix.
        hidden_states: the residual stream before the depth.
        batch: batch made by `batch` of the stack.
    """
    owner = folded_depths(model)[depth]
    assert owner.view is not None
    return _mixer(model, depth).matrix(
        hidden_states, owner.view, owner.inputs(batch), owner.adapters(), owner.own_vectors("mixer")
    )


def _mixer_type(student: RefoldForCausalLM, depth: int) -> str:
    blueprint = student.config.read_blueprint()
    index = blueprint.depths[depth].mixer
    assert index is not None
    return blueprint.mixers[index].mixer.type


def _mixer(model: RefoldForCausalLM, depth: int) -> Mixer:
    index = folded_depths(model)[depth].spec.mixer
    assert index is not None
    return cast("Mixer", model.model.mixers[index])


def _num_heads(teacher: PreTrainedModel) -> dict[int, int]:
    """Returns the number of attention heads of the teacher, by source layer."""
    sources = source_layers(teacher)
    return {sources[layer]: teacher.config.num_attention_heads for layer in attention_layers(teacher)}


def _rows(matrices: Float[Tensor, "B H T T"], index: Int64[Tensor, "K"] | None) -> Float[Tensor, "K H T"]:
    """Returns the rows of the scored positions."""
    rows = matrices.transpose(1, 2).flatten(0, 1)
    return rows if index is None else rows.index_select(0, index)
