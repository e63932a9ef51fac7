"""LoRAs as GGUF adapters beside one base."""

from pathlib import Path

import pytest

from refold.conversion.convert import ConvertOptions, convert
from refold.errors import ExportError
from refold.exporting.export import export
from refold.exporting.gguf import row_order
from refold.exporting.gguf.adapter_file import adapter_contents, base_contents
from refold.modeling.load import load_model
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe

gguf = pytest.importorskip("gguf")
FOLD = {"loops": 2}
CASES = {
    "one-rank": ("llama", {"fold": FOLD, "relax": {"rank": 5}}),
    "ranks-own-vectors": ("llama", {"fold": FOLD, "relax": {"rank": {"q_proj": 3, "down_proj": 7}, "vectors": "own"}}),
    "qwen2-dropped": (
        "qwen2",
        {"fold": FOLD, "drop": {"attention": {"layers": [1]}}, "relax": {"rank": 4, "type": "lora"}},
    ),
    "gemma2-query-scale": ("gemma2", {"fold": FOLD, "relax": {"rank": 4}}),
}


@pytest.fixture(scope="module")
def make_relaxed(make_named, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("relaxed")

    def make(name: str) -> Path:
        variant, recipe = CASES[name]
        if not (folder / name).exists():
            convert(make_named(variant), folder / name, recipe, options=ConvertOptions(allow_larger=True))
        return folder / name

    return make


def test_base_and_adapter_compute_what_the_model_computes(make_relaxed, llama, make_job, gap, tmp_path, monkeypatch):
    jobs = []
    for name in CASES:
        out = export(make_relaxed(name), tmp_path / name, "gguf-lora")
        jobs.append(make_job(out / "base.gguf", lora=str(out / "adapter.gguf")))
    jobs.append({key: value for key, value in jobs[0].items() if key != "lora"})
    monkeypatch.setattr(row_order, "pair_rows", lambda value, num_heads: value)
    turned = export(make_relaxed("one-rank"), tmp_path / "turned.gguf", "gguf-lora")
    jobs.append({**jobs[0], "lora": str(turned)})
    *answers, bare, wrong = llama(jobs)
    for name, answer in zip(CASES, answers, strict=True):
        found = gap(load_model(make_relaxed(name), device="cpu").float(), answer)
        # llama.cpp computes GELU from a table in half precision.
        assert found.logits < (1e-3 if "gemma" in name else 1e-5)
        assert found.has_equal_tokens
    model = load_model(make_relaxed("one-rank"), device="cpu").float()
    assert gap(model, bare).logits > 1e-2, "the control without the adapter"
    assert gap(model, wrong).logits > 1e-2, "the control with rows in another order"


@pytest.mark.parametrize(("variant", "tensor"), [("gemma2", "attn_q.weight"), ("gemma3_text", "attn_q_norm.weight")])
def test_loras_of_queries_are_scaled_as_the_weights_beside_them(variant, tensor, make_arch):
    arch = make_arch(4, variant, head_dim=16, query_pre_attn_scalar=4, layer_types=None)
    recipe = load_recipe({"fold": FOLD, "relax": {"rank": 3}}).resolved()
    blueprint, _, _ = build_blueprint(arch, recipe, None)
    factors = {
        each.name: piece.factor
        for contents in (base_contents(blueprint), adapter_contents(blueprint))
        for each in contents.tensors
        for piece in each.pieces
    }
    assert factors[f"blk.2.{tensor}"] == 2.0
    assert factors["blk.2.attn_q.weight.lora_b"] == factors["blk.2.attn_q.weight"]
    assert factors["blk.2.attn_q.weight.lora_a"] == factors["blk.2.attn_k.weight.lora_b"] == 1.0


def test_one_file_is_the_adapter_alone_and_all_adapters_have_one_base(make_relaxed, tmp_path):
    folder = make_relaxed("one-rank")
    adapter = gguf.GGUFReader(export(folder, tmp_path / "law.gguf", "gguf-lora", dtype="float16"))
    assert adapter.fields["general.type"].contents() == "adapter"
    assert adapter.fields["adapter.lora.alpha"].contents() == 5.0
    assert {tensor.name.rpartition(".")[2] for tensor in adapter.tensors} == {"lora_a", "lora_b"}
    assert {tensor.tensor_type.name for tensor in adapter.tensors} == {"F16"}
    out = export(folder, tmp_path / "out", "gguf-lora", quantise="q8_0")
    names = [tensor.name for tensor in gguf.GGUFReader(out / "base.gguf").tensors]
    assert not any("lora" in name for name in names)
    assert len([name for name in names if name.endswith("attn_q.weight")]) == 4


@pytest.mark.parametrize(
    ("variant", "recipe", "message"),
    [
        ("llama", {"fold": FOLD}, r"LoRAs at some depth .there are none.; it would with relax"),
        ("llama", {"fold": FOLD, "relax": {"rank": 3, "gain": "own"}}, r"LoRAs without gains .depth 0 has gains."),
        ("gpt_neox", {"fold": FOLD, "relax": {"rank": 3}}, r"linears that are not packed .gptneox packs"),
    ],
)
def test_a_model_without_a_base_is_refused(variant, recipe, message, make_source, tmp_path):
    convert(make_source(variant), tmp_path / "folded", recipe, options=ConvertOptions(allow_larger=True))
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "folded", tmp_path / "out.gguf", "gguf-lora")
    assert not (tmp_path / "out.gguf").exists()
