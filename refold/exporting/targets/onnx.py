"""ONNX: one graph with tied weights stored once, for ONNX Runtime, its generate loop, and browsers."""

from refold.blueprint.schema import Blueprint
from refold.exporting.onnx.limits import runtime_limits
from refold.exporting.onnx.storage import FORMATS, Storage
from refold.exporting.target import ExportJob, ExportOptions, ExportTarget, Verdict

USAGE = """\
import onnxruntime_genai as og

model = og.Model("THIS FOLDER")
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length=64, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))"""


class OnnxTarget(ExportTarget):
    """A folder with `model.onnx`, its weights, and the configs of two runtimes."""

    name = "onnx"
    url = "https://onnxruntime.ai/docs/"
    summary = "ONNX graph with tied weights stored once, for ONNX Runtime, ONNX Runtime GenAI and transformers.js"
    engines = ("onnxruntime", "onnxruntime-genai", "onnxruntime-web", "transformers.js")
    usage = USAGE
    quantisations = tuple(FORMATS)
    has_stored_formats = True

    def judge(self, blueprint: Blueprint) -> Verdict:
        return Verdict("kept", runtime_limits(blueprint).sentences())

    def count_bytes(self, blueprint: Blueprint, options: ExportOptions) -> int:
        return Storage(blueprint, options).count_bytes()

    def write(self, job: ExportJob) -> tuple[str, ...]:
        from refold.exporting.onnx.folder import write_onnx

        return write_onnx(job)


ONNX = OnnxTarget()
