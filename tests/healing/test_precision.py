import pytest
import torch

from refold.healing import precision
from refold.healing.precision import attend_in_float32, choose_precision
from refold.modeling.load import load_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("wish", "hidden_size", "has", "expected"),
    [
        ("auto", 256, "amx_tile", torch.bfloat16),
        ("auto", 256, "avx512_bf16", torch.bfloat16),
        ("auto", 32, "avx512_bf16", None),
        ("auto", 256, "avx512", None),
        ("float32", 256, "amx_tile", None),
        ("bfloat16", 32, "avx512", torch.bfloat16),
    ],
)
def test_the_choice_follows_the_machine_and_the_size(monkeypatch, wish, hidden_size, has, expected):
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name == has)
    assert choose_precision(wish, CPU, hidden_size) == expected


def test_attention_runs_in_float32_and_says_the_same(folded, source, monkeypatch):
    seen = []
    forward = precision.sdpa_attention_forward

    def watch(module, query, *arguments, **options):
        seen.append(query.dtype)
        return forward(module, query, *arguments, **options)

    monkeypatch.setattr(precision, "sdpa_attention_forward", watch)
    ids = torch.arange(3, 27).reshape(2, 12)
    packed = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    for folder in (folded, source):
        model = load_model(folder, dtype="float32", device="cpu")
        plain = model(ids, position_ids=packed, use_cache=False).logits
        attend_in_float32(model)
        assert torch.equal(model(ids, position_ids=packed, use_cache=False).logits, plain)
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, position_ids=packed, use_cache=False)
    assert len(seen) == 4 * 4
    assert set(seen) == {torch.float32}


def test_eager_attention_is_left_as_it_is(folded):
    model = load_model(folded, device="cpu", attn_implementation="eager")
    attend_in_float32(model)
    assert model.config._attn_implementation == "eager"


def test_bfloat16_trains_as_float32_does_within_rounding(healing, tmp_path, weights):
    healing({"precision": "float32"}, destination=tmp_path / "one")
    healing({"precision": "bfloat16"}, destination=tmp_path / "two")
    one, two = healing.records[:12], healing.records[12:]
    assert one[0].loss != two[0].loss
    for mine, other in zip(one, two, strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=0.05)
    # What is saved is not what autocast computed with: the model's attention and dtypes are its own.
    assert (tmp_path / "one/config.json").read_bytes() == (tmp_path / "two/config.json").read_bytes()
