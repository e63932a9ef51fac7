from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from refold.errors import RefoldError, SourceError
from refold.modeling.load import choose_device, choose_dtype, load_model, load_tokenizer
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


def test_an_unknown_dtype_is_refused():
    with pytest.raises(RefoldError, match=r"dtype: must be one of float32, bfloat16, float16 \(got 'int8'\)"):
        choose_dtype("int8")
    assert (choose_dtype(None), choose_dtype("float16")) == ("auto", torch.float16)


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
