"""Stock transformers folder of the source's family: loops unrolled, LoRAs merged."""

from refold.blueprint.integers import find_scheme
from refold.blueprint.schema import Blueprint
from refold.blueprint.source_tensors import source_tensors
from refold.checkpoint.card import STOCK_USAGE
from refold.exporting.compressed import PACKED, choose_linears
from refold.exporting.target import ExportJob, ExportOptions, ExportTarget, Verdict
from refold.exporting.unrolled import count_dense_bytes, dense_arch, judge_unrolled
from refold.families.registry import find_family


class DenseTarget(ExportTarget):
    """A folder of the source's family that loads without refold."""

    name = "dense"
    url = "https://huggingface.co/docs/transformers/model_doc/auto"
    summary = "stock transformers folder of the source's family, loops unrolled and LoRAs merged: loads without refold"
    engines = ("transformers", "vllm", "sglang", "mlx-lm", "tgi")
    usage = STOCK_USAGE
    quantisations = PACKED

    def judge(self, blueprint: Blueprint) -> Verdict:
        return judge_unrolled(blueprint)

    def count_bytes(self, blueprint: Blueprint, options: ExportOptions) -> int:
        arch = dense_arch(blueprint)
        tensors = source_tensors(arch, find_family(arch.family))
        schemes = choose_linears(tensors, options)
        floats = count_dense_bytes(blueprint, options.dtype_bytes)
        for name, scheme in schemes.items():
            rows, columns = tensors[name].shape
            floats += find_scheme(scheme).num_bytes(rows, columns) - rows * columns * options.dtype_bytes
        return floats

    def write(self, job: ExportJob) -> tuple[str, ...]:
        from refold.exporting.stock.dense_folder import write_dense

        return write_dense(job)


DENSE = DenseTarget()
