"""Hub folders load where neither refold nor pydantic nor jaxtyping is, and compute the same numbers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from refold.blueprint.schema import Blueprint
from refold.checkpoint.manifest import verify
from refold.conversion.convert import ConvertOptions, convert
from refold.exporting.export import export
from refold.exporting.target import ExportOptions
from refold.exporting.targets.hub import HUB
from refold.modeling.load import load_model

# All cases are converted and exported for the first test.
pytestmark = pytest.mark.timeout(1200)
FOLD = {"loops": 2}
LORA = {"type": "lora", "rank": 5}
FACTOR = {"parameters": 0.5, "weight": "none"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "identity": ("llama", {}),
    "strict": ("llama-v4", {"fold": FOLD}),
    "relaxed": ("llama-mha-bias", {"fold": {**FOLD, "prelude": 1, "coda": 1}, "relax": {**LORA, "vectors": "own"}}),
    "gains": ("llama", {"fold": FOLD, "relax": {**LORA, "gain": "own"}}),
    "prefixes": ("llama", {"fold": FOLD, "relax": {"type": "prefix", "length": 3}}),
    "exits": ("llama", {"fold": FOLD, "exits": {"at": [1], "norm": "own", "head_rank": 2, "gate": True}}),
    "factors": ("gpt_neox", {"fold": FOLD, "relax": LORA, "factor": FACTOR}),
    "bases": ("llama-mha-bias", {"fold": FOLD, "factor": {**FACTOR, "share": "basis"}}),
    "dropped": ("llama", {"drop": {"attention": {"layers": [1]}, "mlp": {"layers": [1, 3]}}}),
    "own-widths": ("llama-mha-bias", {"width": {"mlp": [48, 32, 16, 40], "heads": [1, 2, 4, 3], "weight": "none"}}),
    "window": ("mistral-window", {"fold": FOLD}),
    "keys-of-the-first-loop": ("llama", {"fold": FOLD, "share_kv": {"from": "first_loop"}}),
    "keys-of-some-heads": ("llama", {"share_kv": {"from": {"back": 1}, "heads": [1]}}),
    "neox-tied": ("gpt_neox-tied", {"fold": FOLD}),
    "qwen2": ("qwen2-window", {"fold": FOLD}),
    "qwen3": ("qwen3", {"fold": FOLD, "relax": LORA}),
    "gemma": ("gemma", {"fold": FOLD}),
    "gemma2": ("gemma2", {"fold": FOLD, "relax": LORA}),
    "gemma3": ("gemma3_text-v4", {"fold": FOLD}),
    "olmo2": ("olmo2-bias", {"fold": FOLD}),
    "phi3": ("phi3", {"fold": FOLD}),
    "yarn": ("gpt_neox-yarn", {"fold": FOLD}),
    "dynamic": ("llama-dynamic", {"fold": FOLD}),
    "retention": ("llama", {"mixers": [{"type": "retention"}]}),
    "lightning": (
        "llama",
        {"mixers": [{"type": "retention", "decay": "slopes", "norm": "full", "activation": "silu"}]},
    ),
    "mamba": ("llama", {"mixers": [{"type": "mamba", "transfer": ["mlp"]}]}),
    "mamba2": ("llama", {"fold": FOLD, "mixers": [{"type": "mamba2"}]}),
    "gla": ("llama", {"mixers": [{"type": "gla"}]}),
    "gated_deltanet": ("llama", {"mixers": [{"type": "gated_deltanet"}]}),
    "features": ("llama", {"mixers": [{"type": "linear_attention", "feature_map": "hedgehog"}]}),
    "features-and-window": ("llama", {"mixers": [{"type": "linear_attention", "feature_map": "elu", "window": 7}]}),
    "hybrid": ("llama", {"fold": FOLD, "mixers": [{"type": "gated_deltanet", "except": [1, 3]}]}),
    "int8": ("llama-mqa-mlp-bias", {"fold": FOLD, "quantise": {"to": "int8", "rounding": "plain"}}),
    "int4": ("llama", {"fold": FOLD, "relax": LORA, "quantise": {"to": "int4", "rounding": "plain"}}),
    "int4-bases": ("llama", {"fold": FOLD, "factor": {**FACTOR, "share": "basis"}, "quantise": {"to": "int4z"}}),
    "hybrid-of-three": ("llama", {"mixers": [{"type": "mamba2", "depths": [0]}, {"type": "gla", "depths": [2]}]}),
}
LONG = {"identity", "neox-tied", "qwen2", "qwen3", "gemma", "olmo2", "phi3", "lightning", "hybrid-of-three"}
LONG |= {"gains", "prefixes", "keys-of-some-heads", "dynamic", "retention", "mamba", "features", "int8", "int4-bases"}
LONG |= {"dropped", "window", "yarn"}
"""Cases whose parts stand in other cases or in other tests of the same code too: generating the classes is slow."""
IN_A_CLEAN_PROCESS = """
import sys
from pathlib import Path

BLOCKED = {"refold", "pydantic", "pydantic_core", "jaxtyping"}

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()

tokens = torch.load(sys.argv[1], weights_only=True)
for folder in map(Path, sys.argv[2:]):
    if folder.name == "damaged":
        try:
            load(folder)
        except Exception as error:
            torch.save({"error": f"{type(error).__name__}: {error}"}, folder.with_suffix(".found"))
        continue
    model = load(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config) is type(model.config), type(config)
    with torch.no_grad():
        found = {
            "logits": model(tokens).logits,
            "tokens": model.generate(tokens[:, :9], max_new_tokens=12, do_sample=False),
        }
        if folder.name in ("strict", "relaxed", "hybrid"):
            model.save_pretrained(folder.with_suffix(".saved"))
            found["again"] = load(folder.with_suffix(".saved"))(tokens).logits
            stack = AutoModel.from_pretrained(folder.with_suffix(".saved"), trust_remote_code=True).eval()
            found["stack"] = stack(tokens).last_hidden_state
    torch.save(found, folder.with_suffix(".found"))
assert not BLOCKED & set(sys.modules)
"""


def _tokens() -> torch.Tensor:
    return torch.randint(4, 96, (2, 24), generator=torch.Generator().manual_seed(3))


def _error(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


def _run(folders: list[Path], place: Path, **environment: str) -> None:
    torch.save(_tokens(), place / "tokens")
    command = [sys.executable, "-c", IN_A_CLEAN_PROCESS, str(place / "tokens"), *map(str, folders)]
    variables = {"HF_HOME": str(place / "hf"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folded(make_source, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("folded")

    def make(case: str) -> Path:
        variant, recipe = CASES[case]
        if not (folder / case).exists():
            convert(make_source(variant), folder / case, recipe, options=ConvertOptions(allow_larger=True))
        return folder / case

    return make


def _changed(folded: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Exports a fold and changes the blueprint in its config."""
    out = export(folded, out, "hub")
    config = json.loads((out / "config.json").read_text())
    change(config["blueprint"])
    (out / "config.json").write_text(json.dumps(config))
    return out


def _exchange(blueprint: dict[str, Any]) -> None:
    first, second = blueprint["depths"][:2]
    first["mixer"], second["mixer"] = second["mixer"], first["mixer"]


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, make_source, folded: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The cases of this session, exported, and run in one process without refold and the libraries that refold needs.

    The same process loads a source as `source`, and two exports of `strict` whose blueprint was changed.
    """
    folder = tmp_path_factory.mktemp("exported")
    selected = {item.name for item in request.session.items if item.path == request.path}
    needed = [case for case in CASES if case == "strict" or any(name.endswith(f"[{case}]") for name in selected)]
    exports = {case: export(folded(case), folder / case, "hub") for case in needed}
    exports["source"] = export(make_source("qwen3"), folder / "source", "hub")
    exports["exchanged"] = _changed(folded("strict"), folder / "exchanged", _exchange)
    exports["damaged"] = _changed(
        folded("strict"), folder / "damaged", lambda blueprint: blueprint["depths"][0].update(mixer="first")
    )
    _run(list(exports.values()), folder)
    return {case: torch.load(out.with_suffix(".found"), weights_only=True) for case, out in exports.items()}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.long] * (case in LONG)) for case in CASES])
def test_a_folder_computes_without_refold_as_the_fold_does(case: str, folded, found):
    model: Any = load_model(folded(case), device="cpu")
    with torch.no_grad():
        logits = model(_tokens()).logits
        tokens = model.generate(_tokens()[:, :9], max_new_tokens=12, do_sample=False)
    assert _error(found[case]["logits"], logits) < 2e-5
    assert torch.equal(found[case]["tokens"], tokens)


@pytest.mark.parametrize("case", ["strict", "relaxed", "hybrid"])
def test_a_folder_saved_without_refold_loads_again(case: str, folded, found):
    model: Any = load_model(folded(case), device="cpu")
    with torch.no_grad():
        stack = model.model(_tokens()).last_hidden_state
    assert torch.equal(found[case]["again"], found[case]["logits"])
    assert _error(found[case]["stack"], stack) < 2e-5


def test_control_with_another_part_at_a_depth_the_logits_differ(found):
    assert _error(found["exchanged"]["logits"], found["strict"]["logits"]) > 2e-3


def test_control_the_process_has_no_refold(tmp_path):
    code = IN_A_CLEAN_PROCESS.partition("import torch")[0] + "import refold"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "ModuleNotFoundError: refold is not installed here" in done.stderr


def test_a_damaged_blueprint_is_told_in_one_line(found):
    where = r"config.json: blueprint.depths[0].mixer: int is required"
    assert found["damaged"]["error"].startswith(f"RecipeError: {where}")


def test_the_folder_is_complete_and_says_what_it_is(folded, tmp_path):
    out = export(folded("relaxed"), tmp_path / "out", "hub")
    assert verify(out) == ()
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling_refold.RefoldConfig",
        "AutoModel": "modeling_refold.RefoldModel",
        "AutoModelForCausalLM": "modeling_refold.RefoldForCausalLM",
    }
    card = (out / "README.md").read_text()
    assert 'from_pretrained("THIS FOLDER", trust_remote_code=True)' in card
    assert "`modeling_refold.py` is generated code that needs torch and transformers alone: read it before" in card
    assert "import refold" not in card
    folded_tensors, tensors = (load_file(each / "model.safetensors") for each in (folded("relaxed"), out))
    assert folded_tensors.keys() == tensors.keys()
    assert all(torch.equal(tensors[name], folded_tensors[name]) for name in tensors)


def test_the_planned_bytes_are_the_bytes_written(folded, tmp_path):
    out = export(folded("strict"), tmp_path / "out", "hub", dtype="bfloat16")
    tensors = load_file(out / "model.safetensors")
    blueprint = Blueprint.model_validate(json.loads((out / "config.json").read_text())["blueprint"])
    assert {each.dtype for each in tensors.values()} == {torch.bfloat16}
    assert sum(each.nbytes for each in tensors.values()) == HUB.count_bytes(blueprint, ExportOptions("bfloat16"))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_source_is_exported_as_an_identity_blueprint(make_source, found):
    with torch.no_grad():
        logits = load_model(make_source("qwen3"), device="cpu")(_tokens()).logits
    assert _error(found["source"]["logits"], logits) < 2e-5


def test_refold_itself_opens_the_folder_and_saves_it_without_the_code(folded, tmp_path):
    out = export(folded("strict"), tmp_path / "out", "hub")
    model = load_model(out, device="cpu")
    assert type(model).__module__ == "refold.modeling.model"
    model.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())


BESIDE_REFOLD = """
import sys, refold, torch
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

folder, tokens = sys.argv[1], torch.arange(4, 20)[None]
trusted = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
kind = get_class_from_dynamic_module("modeling_refold.RefoldForCausalLM", folder)
generated = kind.from_pretrained(folder)
native = AutoModelForCausalLM.from_pretrained(folder)
assert type(native).__module__ == "refold.modeling.model"
assert type(generated).__module__.startswith("transformers_modules."), type(generated)
with torch.no_grad():
    logits = [model.eval()(tokens).logits for model in (trusted, generated, native)]
assert torch.equal(logits[0], logits[1]) and torch.equal(logits[1], logits[2])
"""


def test_the_generated_classes_and_those_of_refold_live_beside_each_other(folded, tmp_path):
    out = export(folded("relaxed"), tmp_path / "out", "hub")
    variables = {"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", BESIDE_REFOLD, str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
