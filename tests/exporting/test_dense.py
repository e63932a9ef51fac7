import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from refold.blueprint.owned.merge import Merge
from refold.blueprint.schema import Blueprint
from refold.checkpoint.reader import CheckpointReader
from refold.conversion.convert import ConvertOptions, convert
from refold.errors import ExportError
from refold.exporting import stack_weights
from refold.exporting.export import export
from refold.exporting.stock import dense_folder
from refold.exporting.unrolled import count_dense_bytes, dense_arch, kept_depths
from refold.mixers.retention import Retention
from refold.modeling.load import load_model

FOLD = {"loops": 2}
LORA = {"type": "lora", "rank": 5}
FACTOR = {"parameters": 0.5, "weight": "none"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "identity": ("llama", {}),
    "strict": ("llama-v4", {"fold": FOLD}),
    "relaxed-biases": ("llama-mha-bias", {"fold": FOLD, "relax": LORA}),
    "mlp-biases-tied-head": ("llama-mqa-mlp-bias", {"fold": FOLD, "relax": LORA}),
    "own-vectors": ("llama-mha-bias", {"fold": FOLD, "relax": {**LORA, "vectors": "own"}}),
    "joint-ends": (
        "llama-llama3",
        {"fold": {**FOLD, "prelude": 1, "coda": 1}, "relax": {**LORA, "init": "joint", "vectors": "own"}},
    ),
    "only-mlps-tied": ("llama-linear", {"fold": {**FOLD, "tie": ["mlp"]}, "relax": LORA}),
    "even-widths": ("llama-mha-bias", {"width": {"mlp": 0.7, "heads": 0.5, "weight": "none"}}),
    "own-widths": ("llama-mha-bias", {"width": {"mlp": [48, 32, 16, 40], "heads": [1, 2, 4, 3], "weight": "none"}}),
    "own-widths-packed": ("gpt_neox", {"width": {"mlp": [48, 32, 16, 40], "heads": [1, 2, 4, 3], "weight": "none"}}),
    "pruned": ("llama", {"drop": {"block": {"share": 0.5}}}),
    "no-attention": ("llama-mha-bias", {"drop": {"attention": {"layers": [0, 2]}}}),
    "no-mlp": ("llama-mqa-mlp-bias", {"drop": {"mlp": {"count": 1}}}),
    "nothing-at-a-depth": ("llama", {"drop": {"attention": {"layers": [1]}, "mlp": {"layers": [1, 3]}}}),
    "mistral-window": ("mistral-window", {"fold": FOLD, "relax": LORA}),
    "mistral-no-attention-first": ("mistral-window", {"drop": {"attention": {"layers": [0]}}}),
    "neox-parallel": ("gpt_neox", {"fold": FOLD, "relax": {**LORA, "vectors": "own"}}),
    "neox-sequential": ("gpt_neox-sequential", {"fold": FOLD, "relax": LORA}),
    "neox-tied": ("gpt_neox-tied", {"fold": {**FOLD, "prelude": 2}, "drop": {"mlp": {"layers": [0]}}}),
    "exits": ("llama", {"fold": FOLD, "exits": {"at": [1], "norm": "own", "head_rank": 2, "gate": True}}),
    "neox-no-attention": ("gpt_neox", {"drop": {"attention": {"layers": [2]}}}),
    "yarn": ("gpt_neox-yarn", {"fold": FOLD}),
    "dynamic": ("llama-dynamic", {"fold": FOLD}),
    "qwen2": ("qwen2-window", {"fold": FOLD, "relax": LORA}),
    "qwen3": ("qwen3", {"fold": FOLD, "relax": {**LORA, "vectors": "own"}}),
    "gemma": ("gemma", {"fold": FOLD, "relax": LORA}),
    "gemma-untied": ("gemma-bias", {"drop": {"mlp": {"count": 1}}}),
    "gemma2": ("gemma2", {"fold": FOLD, "relax": {**LORA, "vectors": "own"}}),
    "gemma2-no-attention-first": ("gemma2-v4", {"drop": {"attention": {"layers": [0]}, "block": {"layers": [1]}}}),
    "gemma3": ("gemma3_text-v4", {"fold": FOLD, "relax": {**LORA, "vectors": "own"}}),
    "gemma3-only-local": ("gemma3_text", {"drop": {"block": {"layers": [2]}}}),
    "olmo2": ("olmo2-bias", {"fold": FOLD, "relax": LORA}),
    "olmo2-no-mlp": ("olmo2", {"drop": {"mlp": {"layers": [3]}}}),
    "phi3": ("phi3", {"fold": FOLD, "relax": {**LORA, "vectors": "own"}}),
    "phi3-window": ("phi3-window", {"drop": {"attention": {"layers": [0]}}}),
    "factored-biases": ("llama-mha-bias", {"factor": FACTOR}),
    "factored-fused": ("gpt_neox", {"fold": FOLD, "relax": {**LORA, "vectors": "own"}, "factor": FACTOR}),
    "shared-bases": ("llama-mha-bias", {"fold": FOLD, "factor": {**FACTOR, "share": "basis"}}),
    "shared-bases-relaxed": (
        "gpt_neox",
        {"fold": {**FOLD, "prelude": 1, "coda": 1}, "relax": LORA, "factor": {**FACTOR, "share": "basis"}},
    ),
    "factored-tied-or-not": (
        "llama",
        {
            "fold": FOLD,
            "relax": {"rank": {"split": "measured"}, "init": "joint", "vectors": "own"},
            "factor": {**FACTOR, "split": "measured"},
        },
    ),
}
LOAD_WITHOUT_REFOLD = """
import sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "refold":
            raise ImportError("refold is not installed here")

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM

tokens = torch.load(sys.argv[1], weights_only=True)
for folder in map(Path, sys.argv[2:]):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        torch.save(model.eval()(tokens).logits, folder.with_suffix(".logits"))
assert "refold" not in sys.modules
"""


def _tokens() -> torch.Tensor:
    return torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(3))


def _native_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, device="cpu")(_tokens()).logits


def _stock_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(_tokens()).logits


def _error(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


@pytest.fixture(scope="module")
def folded(make_source, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("folded")

    def make(case: str) -> Path:
        variant, recipe = CASES[case]
        if not (folder / case).exists():
            convert(make_source(variant), folder / case, recipe, options=ConvertOptions(allow_larger=True))
        return folder / case

    return make


@pytest.fixture(scope="module")
def stock_logits(folded: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """All cases exported, loaded in one process that has no refold, and run."""
    folder = tmp_path_factory.mktemp("exported")
    torch.save(_tokens(), folder / "tokens")
    exports = [str(export(folded(case), folder / case)) for case in CASES]
    command = [sys.executable, "-c", LOAD_WITHOUT_REFOLD, str(folder / "tokens"), *exports]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {case: torch.load(folder / f"{case}.logits", weights_only=True) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_the_export_loads_without_refold_and_gives_the_native_logits(case: str, folded, stock_logits):
    assert _error(stock_logits[case], _native_logits(folded(case))) < 2e-5


def _without_lora(self: stack_weights.StackWeights, merge: Merge, dtype: torch.dtype):
    for name in (name for pair in merge.products for name in pair):
        self._reader.read(name)
    assert merge.stored is not None
    return self._reader.read(merge.stored, dtype)


def test_control_without_loras_the_logits_differ(folded, tmp_path, monkeypatch):
    monkeypatch.setattr(stack_weights.StackWeights, "_merged", _without_lora)
    folder = folded("relaxed-biases")
    assert _error(_stock_logits(export(folder, tmp_path / "out")), _native_logits(folder)) > 2e-3


def test_control_with_padding_before_the_inputs_of_narrower_mlps_the_logits_differ(folded, tmp_path, monkeypatch):
    behind = stack_weights.StackWeights._padded

    def before(self: stack_weights.StackWeights, canonical: str, depth: int, value: torch.Tensor):
        found = behind(self, canonical, depth, value)
        return found.roll(found.shape[1] - value.shape[1], 1) if "down_proj.weight" in canonical else found

    monkeypatch.setattr(stack_weights.StackWeights, "_padded", before)
    folder = folded("own-widths")
    assert _error(_stock_logits(export(folder, tmp_path / "out")), _native_logits(folder)) > 2e-3


def test_control_with_coefficients_of_another_depth_the_logits_differ(folded, tmp_path, monkeypatch):
    merged = stack_weights.StackWeights._merged

    def exchanged(self: stack_weights.StackWeights, merge: Merge, dtype: torch.dtype):
        others = {f"depths.{at}.coefficients": f"depths.{(at + 2) % 4}.coefficients" for at in range(4)}
        found = tuple((a, next(b.replace(*each) for each in others.items() if each[0] in b)) for a, b in merge.products)
        return merged(self, replace(merge, products=found), dtype)

    monkeypatch.setattr(stack_weights.StackWeights, "_merged", exchanged)
    folder = folded("shared-bases")
    assert _error(_stock_logits(export(folder, tmp_path / "out")), _native_logits(folder)) > 2e-3


def test_control_with_query_key_value_one_after_the_other_the_logits_differ(folded, tmp_path, monkeypatch):
    monkeypatch.setattr(dense_folder, "pack_pieces", lambda layout, pieces, head_dim: torch.cat(tuple(pieces)))
    folder = folded("neox-parallel")
    assert _error(_stock_logits(export(folder, tmp_path / "out")), _native_logits(folder)) > 2e-3


def test_control_with_tied_instead_of_own_vectors_the_logits_differ(folded, tmp_path, monkeypatch):
    read = stack_weights.StackWeights.read

    def from_first_depth(self: stack_weights.StackWeights, canonical: str, depth: int | None, dtype: torch.dtype):
        value = read(self, canonical, depth, dtype)
        return value if depth is None or value.ndim > 1 else read(self, canonical, 0, dtype)

    monkeypatch.setattr(stack_weights.StackWeights, "read", from_first_depth)
    folder = folded("own-vectors")
    assert _error(_stock_logits(export(folder, tmp_path / "out")), _native_logits(folder)) > 2e-3


def test_control_with_a_dropped_part_that_still_writes_the_logits_differ(folded, tmp_path, monkeypatch):
    def ones(self: stack_weights.StackWeights, canonical: str, dtype: torch.dtype):
        return torch.ones(self._shapes[canonical], dtype=dtype)

    monkeypatch.setattr(stack_weights.StackWeights, "_neutral", ones)
    folder = folded("no-mlp")
    assert _error(_stock_logits(export(folder, tmp_path / "out")), _native_logits(folder)) > 2e-3


def test_depths_that_run_nothing_are_left_out_and_half_depths_are_named(folded, tmp_path):
    out = export(folded("nothing-at-a-depth"), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 3
    card = (out / "README.md").read_text()
    assert "1 of 4 depths have no parts and are dropped" in card
    assert "depths 3 of the folded model have no MLP; here they have one whose down_proj is zero" in card


@pytest.mark.parametrize(
    ("exits", "line"),
    [
        ({"at": [1]}, "- a stock model has no early exits: they are dropped\n"),
        ({"at": [1], "gate": True}, "are dropped, with their own norms, LoRAs and gates\n"),
    ],
)
def test_a_line_says_that_exits_are_gone(make_source, tmp_path, exits, line):
    convert(make_source(), tmp_path / "folded", {"fold": FOLD, "exits": exits})
    out = export(tmp_path / "folded", tmp_path / "dense")
    assert line in (out / "README.md").read_text()


def test_the_planned_bytes_are_the_bytes_written(folded, tmp_path):
    folder = folded("joint-ends")
    blueprint = Blueprint.model_validate(json.loads((folder / "config.json").read_text())["blueprint"])
    out = export(folder, tmp_path / "out", dtype="bfloat16")
    tensors = load_file(out / "model.safetensors")
    assert {each.dtype for each in tensors.values()} == {torch.bfloat16}
    assert sum(each.numel() * 2 for each in tensors.values()) == count_dense_bytes(blueprint, 2)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_special_tokens_are_the_folded_models_even_where_the_stock_config_has_defaults(make_source, tmp_path):
    source = make_source("llama", bos_token_id=None, eos_token_id=None)
    convert(source, tmp_path / "folded", {"fold": FOLD})
    config = AutoModelForCausalLM.from_pretrained(export(tmp_path / "folded", tmp_path / "out")).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, 0)


def _blueprint(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["blueprint"]


def test_windows_a_family_cannot_express_are_refused(folded, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for file in folded("mistral-window").iterdir():
        if file.name != "manifest.json":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["blueprint"]["depths"][1]["window"] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ExportError, match=r"mistral: all layers must have one window and one rope .*; see `refold export --list`"
    ):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mixers_other_than_attention_are_refused_by_name(folded):
    blueprint = Blueprint.model_validate(_blueprint(folded("strict")))
    retention = blueprint.mixers[1].model_copy(update={"mixer": Retention()})
    mixed = blueprint.model_copy(update={"mixers": (blueprint.mixers[0], retention)})
    with pytest.raises(ExportError, match=r"required by llama \(got depths 1, 3: retention\); keep"):
        dense_arch(mixed)


def test_a_stack_that_runs_nothing_is_refused(folded):
    blueprint = Blueprint.model_validate(_blueprint(folded("strict")))
    empty = tuple(depth.model_copy(update={"mixer": None, "mlp": None}) for depth in blueprint.depths)
    nothing = blueprint.model_copy(update={"depths": empty})
    assert kept_depths(nothing) == ()
    with pytest.raises(ExportError, match=r"a depth with a mixer or an MLP is required by llama .all are dropped"):
        dense_arch(nothing)


def test_a_tensor_without_a_place_is_refused(folded, tmp_path):
    folder = tmp_path / "extended"
    folder.mkdir()
    for file in folded("strict").iterdir():
        if file.name != "manifest.json":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.extra": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"1 of the model's tensors have no place: model.extra; convert the source"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_few_matrices_are_in_memory_at_a_time(folded, tmp_path, monkeypatch):
    sizes: list[int] = []
    pack = dense_folder.pack_pieces

    def counted(layout, pieces, head_dim):
        sizes.append(sum(piece.numel() for piece in pieces))
        return pack(layout, pieces, head_dim)

    monkeypatch.setattr(dense_folder, "pack_pieces", counted)
    folder = folded("neox-parallel")
    export(folder, tmp_path / "out")
    with CheckpointReader(tmp_path / "out") as reader:
        assert len(sizes) == len(reader.names())
        assert max(sizes) == max(reader.info(name).num_elements for name in reader.names())
