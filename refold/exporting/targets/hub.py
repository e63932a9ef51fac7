"""Folder for a model hub that keeps the fold's own weights and brings the code that runs them."""

from refold.blueprint.cost import count_weight_bytes
from refold.blueprint.schema import Blueprint
from refold.exporting.target import ExportJob, ExportOptions, ExportTarget, Verdict

HUB_USAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")"""


class HubTarget(ExportTarget):
    """A folder that loads with `trust_remote_code` where refold is not installed. It holds every blueprint."""

    name = "hub"
    url = "https://huggingface.co/docs/transformers/custom_models"
    summary = "folder with the fold's own weights and one generated file of code: loads with trust_remote_code"
    engines = ("transformers",)
    usage = HUB_USAGE

    def judge(self, blueprint: Blueprint) -> Verdict:
        return Verdict("kept")

    def count_bytes(self, blueprint: Blueprint, options: ExportOptions) -> int:
        return count_weight_bytes(blueprint, options.dtype_bytes)

    def write(self, job: ExportJob) -> tuple[str, ...]:
        from refold.exporting.hub.writer import write_hub

        return write_hub(job)


HUB = HubTarget()
