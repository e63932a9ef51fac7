"""The objective `hidden_states`: compares the residual stream after each depth with the teacher's."""

import itertools

from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from refold.errors import HealError
from refold.healing.activations import Want, folded_depths, source_layers
from refold.healing.objectives.alignment import Alignment, distance, teacher_layer_of, teacher_of
from refold.healing.objectives.objective import Step
from refold.modeling.model import RefoldForCausalLM
from refold.recipe import objectives as specs


class HiddenStates(Alignment[specs.HiddenStatesOptions]):
    """Block-output matching (MOHAWK, arXiv 2408.10189, stage 2), for stacks of any depth.

    A depth is trained from the residual stream before its source layer (the first depth: from the embeddings) to the
    residual stream before the source layer of the next depth (the last depth: to the end). So a depth also learns the
    work of dropped layers between it and the next depth. Depths without mixer and MLP are ignored.
    """

    name = "hidden_states"
    teacher_wants = frozenset[Want]({"streams"})

    def __init__(self, options: specs.HiddenStatesOptions):
        super().__init__(options)
        self.student_wants = frozenset[Want]({"streams"}) if options.inputs == "student" else frozenset[Want]()

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        super().check(student, teacher)
        assert isinstance(student, RefoldForCausalLM)
        sources = source_layers(student)
        depths = self.depths(student)
        for before, depth in itertools.pairwise(depths):
            if sources[depth] <= sources[before]:
                raise HealError(
                    f"objective {self.name}: depths that stand for later and later source layers are required (depth "
                    f"{depth} stands for layer {sources[depth]}, depth {before} for {sources[before]}); align "
                    f"mixer_outputs instead"
                )

    def depths(self, student: RefoldForCausalLM) -> list[int]:
        specs = [depth.spec for depth in folded_depths(student)]
        return [index for index, spec in enumerate(specs) if spec.mixer is not None or spec.mlp is not None]

    def teacher_layers(self, teacher: PreTrainedModel) -> set[int]:
        return set(source_layers(teacher))

    def sum_over_depths(
        self, step: Step, student: RefoldForCausalLM, depths: list[int], index: Int64[Tensor, "K"] | None
    ) -> Float[Tensor, ""]:
        streams, layer_of = teacher_of(step).streams, teacher_layer_of(step, student)
        begins = [0, *(layer_of[depth] for depth in depths[1:])]
        ends = [*begins[1:], len(streams) - 1]
        if self.options.inputs == "student":
            assert step.student is not None
            ours = [step.student.streams[depth + 1] for depth in depths]
        else:
            batch = student.model.batch(streams[0].to(student.dtype), position_ids=step.position_ids)
            ours, shared = [], None
            for depth, begin in zip(depths, begins, strict=True):
                # In the student's dtype: a teacher may be stored in another.
                stream = streams[begin].to(student.dtype)
                after, shared = student.model.run(range(depth, depth + 1), stream, batch, shared=shared)
                ours.append(after)
        sums = [
            distance(stream, streams[end], index, self.options.loss) for stream, end in zip(ours, ends, strict=True)
        ]
        return sum(sums[1:], sums[0])
