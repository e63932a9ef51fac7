"""Adapters healed on several domains, swapped on one set of blocks."""

import pytest
import torch

from refold.errors import FolderError, RefoldError
from refold.modeling.adapters import load_adapters
from refold.modeling.load import load_model


def test_adapters_of_a_domain_are_all_that_differs_and_can_be_swapped(healing, tmp_path, folded):
    settings = {"objective": "next_token", "train": ["adapters"]}
    domains = [tmp_path / "one", tmp_path / "two"]
    for seed, domain in enumerate(domains):
        healing({**settings, "seed": seed}, destination=domain)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = [load_model(domain, device="cpu")(ids).logits for domain in domains]
    assert not torch.equal(*expected)
    model = load_model(folded, device="cpu")
    for domain, logits in zip((*domains, domains[0]), (*expected, expected[0]), strict=True):
        assert load_adapters(model, domain) > 0
        assert torch.equal(model(ids).logits, logits)


def test_what_cannot_be_swapped_is_refused(healing, tmp_path, folded, source, make_source):
    healing({"tokens": 128}, destination=tmp_path / "all")
    model = load_model(folded, device="cpu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FolderError, match=r"adapters trained on this model's blocks are required \(lm_head|model\."):
        load_adapters(model, tmp_path / "all")
    with pytest.raises(FolderError, match=r"adapters of this model's blueprint are required \(\d+ tensors"):
        load_adapters(model, source)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(RefoldError, match="a folded model is required"):
        load_adapters(load_model(source, device="cpu"), folded)
