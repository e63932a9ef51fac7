"""A target that runs depth by depth during conversion, against the converted model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refold.blueprint.tensors import target_tensors
from refold.conversion.convert import ConvertOptions, convert
from refold.conversion.sequential import TargetStack
from refold.modeling.load import load_model

RECIPES = {
    "relaxed": {"fold": {"loops": 2}, "relax": {"rank": 3, "init": "svd", "vectors": "own", "gain": "own"}},
    "shared": {"share_kv": [{"depth": 3, "from": 1}], "drop": {"mlp": {"layers": [2]}}},
    "factors": {"fold": {"loops": 2}, "factor": {"parameters": 0.4, "weight": "none"}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_depth_by_depth_is_the_model(make_source, tmp_path: Path, name):
    made = convert(make_source("gemma2"), tmp_path / "out", RECIPES[name], options=ConvertOptions(allow_larger=True))
    model = load_model(tmp_path / "out", device="cpu").model
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    ids = torch.randint(95, (5, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.cat((torch.arange(5), torch.arange(7))).expand(5, -1)
    seen, streams = {}, []
    for index, depth in enumerate(model.depths):
        depth.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0]))
        for part in (model.mixers[made.blueprint.depths[index].mixer],):
            part.o_proj.register_forward_pre_hook(lambda module, inputs: seen.setdefault(len(streams) - 1, inputs[0]))
    with torch.no_grad():
        last = model(ids, position_ids=positions)[0]
    stack = TargetStack(made.blueprint, positions, rows_at_once=2)
    hidden = streams[0]
    for index in range(4):
        assert torch.allclose(hidden, streams[index], atol=1e-4)
        names = [each.name for each in target_tensors(made.blueprint) if runs(made.blueprint, each, index)]
        later = [each for each in names if ".down_proj." in each]
        for each in names:
            if each not in later:
                stack.put(each, tensors[each])
        # What comes behind a linear need not be there yet.
        found = torch.cat([stack.input_of(index, "o_proj", rows, hidden[rows]) for rows in stack.rows])
        assert torch.allclose(found, seen[index], atol=1e-4)
        for each in later:
            stack.put(each, tensors[each])
        hidden = stack.run(index, hidden)
        stack.take_out(names)
    assert torch.allclose(model.norm(hidden), last, atol=1e-4)
    assert all(each.is_meta for each in stack._model.parameters())


def runs(blueprint, tensor, index: int) -> bool:
    if tensor.depth is not None:
        return tensor.depth == index
    return tensor.part is not None and tensor.part == getattr(blueprint.depths[index], tensor.pool)
