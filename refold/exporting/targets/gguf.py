"""One GGUF file for llama.cpp, with tokenizer and chat template: sharing and dropped parts kept where it can."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from refold.blueprint.schema import Blueprint
from refold.exporting.gguf.choice import choose_contents, judge_contents
from refold.exporting.gguf.number_formats import QUANTISATIONS, check_formats, count_file_bytes
from refold.exporting.gguf.stored_formats import stored_formats
from refold.exporting.target import ExportJob, ExportOptions, FileTarget, Verdict

if TYPE_CHECKING:
    from refold.checkpoint.provenance import Stage
    from refold.exporting.opened import OpenedModel


class GgufTarget(FileTarget):
    """A file that llama.cpp, and every program built on it, reads."""

    name = "gguf"
    url = "https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"
    summary = "one GGUF file with tokenizer: strict folds and dropped parts keep their size, all else is unrolled"
    engines = ("llama.cpp",)
    usage = "llama-cli -m model.gguf -p 'Once upon a time'"
    quantisations = QUANTISATIONS
    has_stored_formats = True
    suffix = ".gguf"

    def judge(self, blueprint: Blueprint) -> Verdict:
        return judge_contents(blueprint)

    def count_bytes(self, blueprint: Blueprint, options: ExportOptions) -> int:
        contents = choose_contents(blueprint).contents
        assert contents is not None
        return count_file_bytes(contents, options, stored_formats(contents, blueprint, options).by_name)

    def write(self, job: ExportJob) -> tuple[str, ...]:
        from refold.exporting.gguf.model_file import write_model_file

        return write_model_file(job, job.options, job.out.path / "model.gguf")

    def write_file(
        self, model: "OpenedModel", options: ExportOptions, path: Path, stages: Sequence["Stage"]
    ) -> tuple[str, ...]:
        from refold.exporting.gguf.model_file import write_model_file

        return write_model_file(model, options, path, stages)

    def is_own_file(self, path: Path) -> bool:
        from refold.exporting.gguf.file_writer import is_own_file

        return is_own_file(path)

    def check(self, options: ExportOptions) -> None:
        super().check(options)
        check_formats(options.keep)


GGUF = GgufTarget()
