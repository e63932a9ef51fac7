"""Contract of GGUF files: what llama.cpp computes from them is what the model computes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from refold.conversion.convert import ConvertOptions, convert
from refold.errors import ExportError
from refold.exporting.export import export
from refold.exporting.gguf import choice, row_order
from refold.exporting.gguf.contents import GgufContents
from refold.modeling.load import load_model

FOLD = {"fold": {"loops": 2}}
LORA = {"type": "lora", "rank": 5}
SILU = {"hidden_act": "silu"}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 1.4,
    "beta_fast": 16.0,
}
MAMBA = {"type": "mamba2", "transfer": "all", "depths": [1, 3]}


class Case(NamedTuple):
    architecture: str
    variant: str
    recipe: Mapping[str, Any] = MappingProxyType({})
    fields: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "llama": Case("llama", "llama"),
    "all-biases": Case("llama", "llama-mha-bias", {}, {**SILU, "mlp_bias": True}),
    "linear-rope-head-dim": Case("llama", "llama-linear"),
    "yarn": Case("llama", "llama-yarn"),
    "yarn-factors": Case("llama", "llama", {}, {"rope_parameters": YARN}),
    "mistral": Case("llama", "mistral-full", {}, SILU),
    "qwen2": Case("qwen2", "qwen2"),
    "qwen3": Case("qwen3", "qwen3", FOLD, {"attention_bias": False}),
    "gemma": Case("gemma", "gemma"),
    "gemma2": Case("gemma2", "gemma2", {"fold": {"loops": 2}, "relax": LORA}),
    "gemma2-dropped": Case("gemma2", "gemma2", {"drop": {"attention": {"layers": [1]}}}),
    "gemma3": Case("gemma3", "gemma3_text"),
    "gemma3-scaled": Case("gemma3", "gemma3_text-v4"),
    "olmo2": Case("olmo2", "olmo2", {"drop": {"mlp": {"layers": [1]}}}),
    "phi3": Case("phi3", "phi3", {**FOLD, "relax": {**LORA, "vectors": "own"}}),
    "strict-phi3": Case("nanbeige", "phi3", FOLD),
    "phi3-partial": Case("phi3", "phi3-window", {}, {"sliding_window": None}),
    "neox": Case("gptneox", "gpt_neox", {**FOLD, "relax": {**LORA, "vectors": "own"}}),
    "neox-sequential": Case("gptneox", "gpt_neox-sequential"),
    "neox-tied": Case("gptneox", "gpt_neox-tied"),
    "strict": Case("nanbeige", "llama", FOLD),
    "strict-4": Case("nanbeige", "llama", {"fold": {"loops": 4}}),
    "strict-uneven": Case("nanbeige", "llama", {"fold": {"loops": 3, "uneven": "drop"}}),
    "strict-llama3-tied": Case("nanbeige", "llama-llama3", FOLD, SILU),
    "strict-qwen2": Case("nanbeige", "qwen2", FOLD),
    "strict-exits": Case("nanbeige", "llama", {**FOLD, "exits": {"at": [1], "norm": "own", "gate": True}}),
    "prelude": Case("llama", "llama", {"fold": {"loops": 2, "prelude": 1, "coda": 1}}),
    "relaxed": Case("llama", "llama", {**FOLD, "relax": LORA}),
    "relaxed-own": Case("llama", "llama", {**FOLD, "relax": {**LORA, "vectors": "own"}}),
    "low-rank": Case("llama", "llama", {"factor": {"parameters": 0.5, "weight": "none"}}),
    "dropped-blocks": Case("llama", "llama", {"drop": {"block": {"layers": [2]}}}),
    "dropped-attention": Case("deci", "llama", {"drop": {"attention": {"layers": [1, 3]}}}),
    "dropped-first-attention": Case("deci", "llama-yarn", {"drop": {"attention": {"layers": [0, 2]}}}),
    "dropped-mlps": Case("deci", "qwen2", {"drop": {"mlp": {"layers": [0, 3]}}}),
    "dropped-middle-mlps": Case("deci", "llama", {"drop": {"mlp": {"layers": [1, 2]}}}),
    "dropped-both": Case("deci", "llama", {"drop": {"attention": {"layers": [1]}, "mlp": {"layers": [1, 3]}}}),
    "even-widths": Case("llama", "llama", {"width": {"mlp": 0.7, "heads": 0.5, "weight": "none"}}),
    "own-widths-biases": Case(
        "llama", "llama-mha-bias", {"width": {"mlp": [48, 32, 16, 40], "heads": [1, 2, 4, 3], "weight": "none"}}, SILU
    ),
    "own-widths-dropped": Case(
        "deci",
        "llama",
        {
            "width": {"mlp": [48, 32, 16, 40], "heads": [1, 2, 1, 2], "weight": "none"},
            "drop": {"attention": {"layers": [0]}, "mlp": {"layers": [2]}},
        },
    ),
    "own-widths-qwen3": Case(
        "qwen3",
        "qwen3",
        {"width": {"mlp": [48, 32, 16, 40], "heads": [1, 2, 2, 1], "weight": "none"}},
        {"attention_bias": False},
    ),
    "hybrid": Case("granitehybrid", "llama", {"mixers": [MAMBA]}),
    "hybrid-groups": Case(
        "granitehybrid", "llama", {**FOLD, "mixers": [{**MAMBA, "transfer": ["mlp"], "q_heads": 2, "k_heads": 1}]}
    ),
    "hybrid-wide": Case(
        "granitehybrid", "llama", {"mixers": [{**MAMBA, "depths": [0], "transfer": ["mlp"], "value_dim": 16}]}
    ),
}
GELU = ("gemma", "gemma2", "gemma3", "gptneox")
"""Architectures whose activation llama.cpp reads from a table in half precision."""
CONTROLS = ("order of rotary rows", "norm between loops", "one loop", "offset of norms", "zero MLP left out")


@pytest.fixture(scope="module")
def make_folded(make_named, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("folded")

    def make(name: str) -> Path:
        case = CASES[name]
        if not (folder / name).exists():
            source = make_named(case.variant, **case.fields)
            if case.recipe:
                options = ConvertOptions(allow_larger=True)
                convert(source, folder / name, dict(case.recipe), options=options)
            else:
                source.rename(folder / name)
        return folder / name

    return make


@pytest.fixture(scope="module")
def answers(make_folded, llama, make_job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All cases exported, loaded in one process of llama.cpp, and run."""
    folder = tmp_path_factory.mktemp("exported")
    jobs = [make_job(export(make_folded(name), folder / f"{name}.gguf", "gguf")) for name in CASES]
    return dict(zip(CASES, llama(jobs), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_the_model_computes(name: str, make_folded, answers, gap):
    model = load_model(make_folded(name), device="cpu")
    found = gap(model.float().eval(), answers[name])
    if CASES[name].architecture in GELU:
        assert found.logits < 2e-3
        assert found.greedy < 2e-3
    else:
        assert found.logits < 1e-5
        assert found.has_equal_tokens


@pytest.mark.parametrize("name", CASES)
def test_the_architecture_keeps_most_of_the_saving(name: str, make_folded, tmp_path):
    gguf = pytest.importorskip("gguf")
    out = export(make_folded(name), tmp_path / "model.gguf", "gguf")
    assert gguf.GGUFReader(out).fields["general.architecture"].contents() == CASES[name].architecture


def _changed(control: str, contents: GgufContents) -> GgufContents:
    fields, tensors = dict(contents.fields), contents.tensors
    if control == "norm between loops":
        fields["{arch}.skip_loop_final_norm"] = False
    if control == "one loop":
        fields["{arch}.num_loops"] = 1
    if control == "offset of norms":
        tensors = tuple(
            type(each)(**{**vars(each), "pieces": tuple(type(p)(**{**vars(p), "offset": 0.0}) for p in each.pieces)})
            for each in tensors
        )
    if control == "zero MLP left out":
        fields["{arch}.feed_forward_length"] = [48, 0, 0, 48]
        tensors = tuple(each for each in tensors if not each.name.startswith(("blk.1.ffn", "blk.2.ffn")))
    return GgufContents(contents.architecture, fields, tensors, contents.notes)


def test_controls_without_a_convention_the_logits_differ(make_folded, llama, make_job, gap, tmp_path, monkeypatch):
    cases = dict(zip(CONTROLS, ("llama", "strict", "strict", "gemma", "dropped-middle-mlps"), strict=True))
    jobs = []
    for control, name in cases.items():
        with monkeypatch.context() as patch:
            if control == "order of rotary rows":
                patch.setattr(row_order, "pair_rows", lambda value, num_heads: value)
            for kind in ("unrolled", "looped", "pruned"):
                made = getattr(choice, f"{kind}_contents")
                patch.setattr(choice, f"{kind}_contents", lambda *a, made=made, c=control: _changed(c, made(*a)))
            jobs.append(make_job(export(make_folded(name), tmp_path / f"{len(jobs)}.gguf", "gguf")))
    for (control, name), answer in zip(cases.items(), llama(jobs), strict=True):
        assert gap(load_model(make_folded(name), device="cpu").float(), answer).logits > 1e-2, control


REFUSED = {
    "activation": ("llama-v4", {}, {}, r"activation silu, as llama has .got relu."),
    "bias": ("qwen3", {}, {}, r"no mixer.o_proj.bias, as qwen3 has"),
    "head": ("gemma-bias", {}, {}, r"a head tied to the embedding, as gemma has .got an untied head."),
    "cap": ("gemma2-v4", {}, {}, r"a soft-cap of attention, as gemma2 has .got None."),
    "windows": (
        "gemma2",
        {"drop": {"block": {"layers": [0]}}},
        {},
        r"layers with a window in a fixed period.*windowed and full layers fwf.*whole periods",
    ),
    "mixer": (
        "llama",
        {"mixers": [{"type": "retention"}]},
        {},
        r"attention at every depth .got depths 0..3: retention",
    ),
    "keys": ("llama", {"share_kv": {"from": "pairs"}}, {}, r"keys and values of its own at every depth"),
    "mamba": ("llama", {"mixers": [{"type": "mamba2"}]}, {}, r"attention in at least one layer .Mamba-2 in all."),
    "mamba-gate": (
        "llama",
        {"mixers": [{**MAMBA, "gate": "none"}]},
        {},
        r"a grouped norm and a silu gate .got norm group, gate none",
    ),
    "rope": (
        "qwen2",
        {},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 50.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        r"rotary scaling other than llama3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_llama_cpp_cannot_hold_is_refused_by_name(name: str, make_source, tmp_path: Path):
    variant, recipe, fields, message = REFUSED[name]
    source = make_source(variant, **fields)
    if recipe:
        convert(source, tmp_path / "folded", recipe, options=ConvertOptions(allow_larger=True))
        source = tmp_path / "folded"
    with pytest.raises(ExportError, match=message):
        export(source, tmp_path / "model.gguf", "gguf")
    assert not (tmp_path / "model.gguf").exists()
