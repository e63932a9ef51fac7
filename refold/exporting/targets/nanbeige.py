"""Transformers-style folder of a looped Llama: stored layers once, run `num_loops` times."""

import math

from refold.blueprint.cost import count_parameters
from refold.blueprint.owned.registry import OWNED
from refold.blueprint.schema import Blueprint
from refold.exporting.cycle import cycle_obstacles, find_cycle
from refold.exporting.llama_shaped import StoredLayer, llama_obstacles, stored_tensors
from refold.exporting.target import ExportJob, ExportOptions, ExportTarget, Obstacle, Verdict, impossible
from refold.exporting.unrolled import dense_arch


class NanbeigeTarget(ExportTarget):
    """A folder whose config has `num_loops`, which engines with the class `NanbeigeForCausalLM` run."""

    name = "nanbeige"
    url = "https://huggingface.co/Nanbeige"
    summary = "folder of a looped Llama with each stored layer once, for strict folds"
    engines = ("sglang", "mlx-lm")
    usage = """\
from mlx_lm import generate, load

model, tokenizer = load("THIS FOLDER")
print(generate(model, tokenizer, prompt="Once upon a time"))"""

    def judge(self, blueprint: Blueprint) -> Verdict:
        obstacles = _obstacles(blueprint)
        if obstacles:
            return impossible(obstacles)
        lost = tuple(sentence for kind in OWNED for sentence in kind.lost(blueprint))
        if _count(blueprint) <= count_parameters(blueprint).total:
            return Verdict("kept", lost)
        return Verdict("larger", ("low-rank factors are multiplied out", *lost))

    def count_bytes(self, blueprint: Blueprint, options: ExportOptions) -> int:
        return _count(blueprint) * options.dtype_bytes

    def write(self, job: ExportJob) -> tuple[str, ...]:
        from refold.exporting.stock.llama_folder import write_llama_folder

        cycle = find_cycle(job.blueprint)
        fields = {
            "architectures": ["NanbeigeForCausalLM"],
            "model_type": "nanbeige",
            "num_loops": cycle.num_loops,
            # The final norm runs once, behind the last loop.
            "skip_loop_final_norm": True,
        }
        notes = write_llama_folder(job, _layers(job.blueprint), fields)
        return (f"{cycle.num_layers} stored layers run {cycle.num_loops} times", *notes)


def _obstacles(blueprint: Blueprint) -> list[Obstacle]:
    found = llama_obstacles(blueprint, "nanbeige")
    return found if any(not each.change for each in found) else found + cycle_obstacles(blueprint)


def _layers(blueprint: Blueprint) -> list[StoredLayer]:
    return [StoredLayer(depth) for depth in find_cycle(blueprint).depths]


def _count(blueprint: Blueprint) -> int:
    tensors = stored_tensors(dense_arch(blueprint), _layers(blueprint))
    return sum(math.prod(each.shape) for _, each in tensors)


NANBEIGE_FOLDER = NanbeigeTarget()
