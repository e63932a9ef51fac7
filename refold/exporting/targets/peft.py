"""PEFT adapter: the LoRAs of a model, beside a stock folder of its blocks that several domains share."""

from refold.blueprint.owned.registry import OWNED
from refold.blueprint.schema import Blueprint
from refold.blueprint.source_tensors import source_tensors
from refold.exporting.target import ExportJob, ExportOptions, ExportTarget, Obstacle, Verdict, impossible
from refold.exporting.unrolled import (
    count_dense_bytes,
    dense_arch,
    judge_unrolled,
    kept_depths,
    width_obstacles,
    without_adapters,
)
from refold.families.registry import find_family

USAGE = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
model = PeftModel.from_pretrained(base, "THIS FOLDER/adapter")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")"""


class PeftTarget(ExportTarget):
    """A stock folder without LoRAs, and in it the folder `adapter` with one LoRA for each linear of each layer."""

    name = "peft"
    url = "https://huggingface.co/docs/peft/developer_guides/checkpoint"
    summary = "the LoRAs as a PEFT adapter (adapter/), in a stock folder of the blocks that all domains share"
    engines = ("peft",)
    usage = USAGE

    def judge(self, blueprint: Blueprint) -> Verdict:
        obstacles = _obstacles(blueprint)
        if obstacles:
            return impossible(obstacles)
        verdict = judge_unrolled(without_adapters(blueprint))
        if verdict.status == "impossible":
            return verdict
        lost = tuple(sentence for kind in OWNED for sentence in kind.lost(blueprint))
        return Verdict("larger", ("the base repeats tied weights; it is stored once for all adapters", *lost))

    def count_bytes(self, blueprint: Blueprint, options: ExportOptions) -> int:
        base = without_adapters(blueprint)
        kept, arch, numbers = kept_depths(blueprint), dense_arch(base), 0
        for tensor in source_tensors(arch, find_family(arch.family)).values():
            if tensor.layer is not None and len(tensor.shape) == 2:
                ranks = blueprint.depths[kept[tensor.layer]].ranks
                linears = [piece.removesuffix(".weight").partition(".")[2] for piece in tensor.rule.pieces]
                numbers += sum(tensor.shape) * sum(ranks.get(linear, 0) for linear in linears)
        return count_dense_bytes(base, options.dtype_bytes) + numbers * options.dtype_bytes

    def write(self, job: ExportJob) -> tuple[str, ...]:
        from refold.exporting.stock.peft_adapter import write_base_and_adapter

        return write_base_and_adapter(job)


def _obstacles(blueprint: Blueprint) -> list[Obstacle]:
    found = []
    if not any(depth.ranks for depth in blueprint.depths):
        found.append(Obstacle("LoRAs at some depth", "there are none", "relax"))
    if any(rank == 0 for part in (*blueprint.mixers, *blueprint.mlps) for rank in part.factors.values()):
        got = "LoRAs that replace a linear"
        found.append(Obstacle("a stored weight under each LoRA", got, "factor with a rank above 0"))
    return found + width_obstacles(blueprint)


PEFT = PeftTarget()
