import pytest
import torch

from refold.conversion.convert import ConvertOptions, convert
from refold.modeling.load import load_model
from refold.scoring.predict import head_of, predict, predict_exits

OWN = {"at": [0, 2], "norm": "own", "head_rank": 3, "gate": True}


@pytest.fixture
def model(make_source, tmp_path):
    def make(exits: dict, **source):
        convert(
            make_source(**source),
            tmp_path / "folded",
            {"fold": {"loops": 2}, "exits": exits},
            options=ConvertOptions(allow_larger=True),
        )
        model = load_model(tmp_path / "folded", device="cpu")
        generator = torch.Generator().manual_seed(1)
        for weight in model.model.exits.parameters():
            weight.data.add_(torch.randn(weight.shape, generator=generator))
        return model

    return make


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(2, 95, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("exits", [{"at": [0, 2]}, OWN])
@torch.no_grad()
def test_one_pass_gives_the_full_depth_and_every_exit(model, tokens, exits):
    model = model(exits)
    final, found = predict_exits(model, tokens)
    torch.testing.assert_close(final.head.logits(final.hidden), model(tokens).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(final.hidden, predict(model, tokens).hidden)
    assert [left.depths for left in found] == [1, 3]
    out = model(tokens, output_exits=True)
    for place, left in enumerate(found):
        logits = left.predictions.head.logits(left.predictions.hidden)
        torch.testing.assert_close(logits, out.exit_logits[place], rtol=1e-5, atol=1e-5)
        assert (left.gate is None) == (exits is not OWN)
        assert left.gate is None or torch.equal(left.gate, out.exit_gates[place])


@torch.no_grad()
def test_documents_are_kept_apart(model, tokens):
    model = model(OWN)
    positions = torch.cat((torch.arange(5), torch.arange(7))).expand(2, -1)
    _, packed = predict_exits(model, tokens, position_ids=positions)
    _, alone = predict_exits(model, tokens[:, 5:])
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one.predictions.hidden[:, 5:], other.predictions.hidden, rtol=1e-4, atol=1e-4)


def test_a_head_has_the_lora_of_its_exit_alone(model):
    model = model(OWN)
    pairs = [head_of(model, depths).lora for depths in (1, 3)]
    for index, pair in zip((0, 2), pairs, strict=True):
        assert pair is not None
        lora = model.model.exits[str(index)].lora["lm_head"]
        assert pair[0] is lora.a
        assert pair[1] is lora.b
    assert head_of(model).lora is None
    assert head_of(model, 2).lora is None
