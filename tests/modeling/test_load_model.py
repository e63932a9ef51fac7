import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from refold.errors import FolderError, RefoldError, SourceError
from refold.modeling import load
from refold.modeling.load import choose_device, choose_dtype, computes_fast, load_model, load_tokenizer, stored_dtype
from refold.modeling.model import RefoldForCausalLM


def test_folded_models_and_sources_load_alike_ready_to_evaluate(fold, make_source):
    folded = load_model(fold("llama"), device="cpu", dtype="bfloat16")
    source = load_model(make_source("llama"), device="cpu")
    assert isinstance(folded, RefoldForCausalLM)
    assert isinstance(source, LlamaForCausalLM)
    assert (folded.dtype, source.dtype) == (torch.bfloat16, torch.float32)
    assert not folded.training
    assert not source.training


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(RefoldError, match=r"device: one of this machine's devices is required \(got 'gpu'"):
        choose_device("gpu")
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(RefoldError, match=r"device: one that computes is required .got 'meta'.; give cpu"):
        choose_device("meta")


def test_an_unknown_dtype_is_refused():
    with pytest.raises(RefoldError, match=r"dtype: must be one of float32, bfloat16, float16 \(got 'int8'\)"):
        choose_dtype("int8")
    assert (choose_dtype(None), choose_dtype("float16")) == ("auto", torch.float16)


@pytest.fixture
def half_folder(fold, tmp_path):
    load_model(fold("llama"), device="cpu").bfloat16().save_pretrained(tmp_path / "half")
    return tmp_path / "half"


@pytest.fixture
def slow_half(monkeypatch):
    """A CPU without instructions for half precision."""
    monkeypatch.setattr(load, "_has_half_instructions", lambda dtype: False)
    load._tell_replaced.cache_clear()


def test_weights_are_computed_with_in_float32_where_half_precision_is_slow(half_folder, slow_half, caplog):
    with caplog.at_level(logging.WARNING, logger="refold"):
        model = load_model(half_folder, device="cpu")
        load_model(half_folder, device="cpu")
    assert (model.dtype, stored_dtype(model)) == (torch.float32, torch.bfloat16)
    # Said once, whatever is loaded.
    assert [record.message for record in caplog.records] == [
        "bfloat16 is slow on this CPU: weights stored in it are computed with in float32 (dtype bfloat16 forces it)"
    ]
    stored = load_model(half_folder, device="cpu", dtype="auto")
    assert stored.dtype == stored_dtype(stored) == torch.bfloat16
    for name, value in stored.named_parameters():
        assert torch.equal(value.float(), model.get_parameter(name)), name


def test_the_dtype_asked_for_is_kept_where_it_is_slow(half_folder, slow_half):
    assert load_model(half_folder, device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_weights_stay_as_stored_where_that_computes_fast(half_folder, monkeypatch):
    monkeypatch.setattr(load, "_has_half_instructions", lambda dtype: True)
    assert load_model(half_folder, device="cpu").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_half_precision_on_cpus_is_ever_slow(dtype, slow_half):
    assert computes_fast(torch.float32, torch.device("cpu"))
    assert computes_fast(dtype, torch.device("cuda"))
    assert not computes_fast(dtype, torch.device("cpu"))


def test_a_build_without_half_precision_products_is_slow(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    load._has_half_instructions.cache_clear()
    assert not computes_fast(torch.bfloat16, torch.device("cpu"))
    load._has_half_instructions.cache_clear()


def test_an_unknown_back_end_is_named(fold):
    with pytest.raises(SourceError, match=r"cannot be loaded .*nonsense"):
        load_model(fold("llama"), device="cpu", attn_implementation="nonsense")


def test_a_model_of_an_unknown_family_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    with pytest.raises(SourceError, match=r"model_type: must be one of .* \(got 'lama'\).*llama"):
        load_model(tmp_path)


def test_a_missing_tokenizer_is_said(fold):
    with pytest.raises(SourceError, match=r"a tokenizer is required \(none there\)"):
        load_tokenizer(fold("llama"))


def test_a_tokenizer_goes_with_the_model(material, tmp_path):
    from refold.conversion.convert import convert

    source = material / "models" / "stories260K"
    convert(source, tmp_path / "out")
    ours, theirs = load_tokenizer(tmp_path / "out"), load_tokenizer(source)
    assert ours.encode("Once upon a time") == theirs.encode("Once upon a time")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_too_little_memory_is_one_line(fold, monkeypatch, error):
    from transformers import AutoModelForCausalLM

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(SourceError, match=r"enough memory for its weights is required \(.*\); free some") as caught:
        load_model(fold("llama"))
    assert "\n" not in str(caught.value)


def test_a_blueprint_of_other_tensors_is_refused_before_anything_is_made(fold, tmp_path):
    folder = Path(shutil.copytree(fold("llama"), tmp_path / "out"))
    (folder / "manifest.json").unlink()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    blueprint = config["blueprint"]

    def write(**changes):
        path.write_text(json.dumps({**config, "blueprint": {**blueprint, **changes}}))

    write(arch={**blueprint["arch"], "hidden_size": 64})
    with pytest.raises(FolderError, match=r"weights must be those of its blueprint \(model.* has shape "):
        load_model(folder)
    write(depths=[*blueprint["depths"], {**blueprint["depths"][0], "mixer": 77}])
    with pytest.raises(FolderError, match=r"config\.json: blueprint"):
        load_model(folder)
