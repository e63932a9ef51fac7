"""The objective `mixer_outputs`: compares the output of each mixer with the teacher's."""

from jaxtyping import Float, Int64
from torch import Tensor

from refold.healing.activations import Want
from refold.healing.objectives.alignment import Alignment, distance, teacher_layer_of, teacher_of
from refold.healing.objectives.objective import Step
from refold.modeling.model import RefoldForCausalLM
from refold.recipe import objectives as specs


class MixerOutputs(Alignment[specs.MixerOutputsOptions]):
    """Attention-output transfer (LoLCATs, arXiv 2410.10254, section 3.2; RADLADS, arXiv 2505.03005, stage 1).

    Each depth with a mixer is compared with the mixer of its source layer. With `inputs: teacher` the mixer reads the
    teacher's residual stream before this layer, and only mixers are run. With `inputs: student` it reads the student's
    own residual stream.
    """

    name = "mixer_outputs"

    def __init__(self, options: specs.MixerOutputsOptions):
        super().__init__(options)
        reads_teacher = options.inputs == "teacher"
        self.student_wants = frozenset[Want]() if reads_teacher else frozenset[Want]({"mixers"})
        self.teacher_wants = frozenset[Want]({"streams", "mixers"} if reads_teacher else {"mixers"})

    def sum_over_depths(
        self, step: Step, student: RefoldForCausalLM, depths: list[int], index: Int64[Tensor, "K"] | None
    ) -> Float[Tensor, ""]:
        teacher, layer_of = teacher_of(step), teacher_layer_of(step, student)
        if self.options.inputs == "student":
            assert step.student is not None
            ours = step.student.mixers
        else:
            # In the student's dtype: a teacher may be stored in another.
            streams = {depth: teacher.streams[layer_of[depth]].to(student.dtype) for depth in depths}
            batch = student.model.batch(streams[depths[0]], position_ids=step.position_ids)
            ours, shared = {}, None
            for depth in depths:
                ours[depth], shared = student.model.mix(depth, streams[depth], batch, shared)
        sums = [distance(ours[depth], teacher.mixers[layer_of[depth]], index, self.options.loss) for depth in depths]
        return sum(sums[1:], sums[0])
