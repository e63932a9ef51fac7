"""GGUF adapters: the LoRAs of a model beside a base that several domains share."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from refold.blueprint.owned.registry import OWNED
from refold.blueprint.schema import Blueprint
from refold.exporting.gguf.adapter_file import adapter_contents, adapter_obstacles, base_contents
from refold.exporting.gguf.number_formats import QUANTISATIONS, check_formats, count_file_bytes
from refold.exporting.gguf.stored_formats import stored_formats
from refold.exporting.target import ExportJob, ExportOptions, FileTarget, Verdict, impossible
from refold.exporting.unrolled import without_adapters

if TYPE_CHECKING:
    from refold.checkpoint.provenance import Stage
    from refold.exporting.opened import OpenedModel


class GgufLoraTarget(FileTarget):
    """An adapter file; as a folder, with its base: the stored blocks, unrolled, without LoRAs."""

    name = "gguf-lora"
    url = "https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md"
    summary = "the LoRAs as a GGUF adapter (adapter.gguf), beside the base that all domains share (base.gguf)"
    engines = ("llama.cpp",)
    usage = "llama-cli -m base.gguf --lora adapter.gguf -p 'Once upon a time'"
    quantisations = QUANTISATIONS
    has_stored_formats = True
    suffix = ".gguf"

    def judge(self, blueprint: Blueprint) -> Verdict:
        obstacles = adapter_obstacles(blueprint)
        if obstacles:
            return impossible(obstacles)
        lost = tuple(sentence for kind in OWNED for sentence in kind.lost(blueprint))
        return Verdict("larger", ("the base repeats tied weights; it is stored once for all adapters", *lost))

    def count_bytes(self, blueprint: Blueprint, options: ExportOptions) -> int:
        adapter = count_file_bytes(adapter_contents(blueprint), ExportOptions(dtype=options.dtype))
        base = base_contents(blueprint)
        stored = stored_formats(base, without_adapters(blueprint), options)
        return adapter + count_file_bytes(base, options, stored.by_name)

    def write(self, job: ExportJob) -> tuple[str, ...]:
        from refold.exporting.gguf.model_file import write_adapter, write_base

        base = write_base(job, job.options, job.out.path / "base.gguf")
        return (*base, *write_adapter(job, job.options, job.out.path / "adapter.gguf"))

    def write_file(
        self, model: "OpenedModel", options: ExportOptions, path: Path, stages: Sequence["Stage"]
    ) -> tuple[str, ...]:
        from refold.exporting.gguf.model_file import write_adapter

        return write_adapter(model, options, path, stages)

    def is_own_file(self, path: Path) -> bool:
        from refold.exporting.gguf.file_writer import is_own_file

        return is_own_file(path)

    def check(self, options: ExportOptions) -> None:
        super().check(options)
        check_formats(options.keep)


GGUF_LORA = GgufLoraTarget()
