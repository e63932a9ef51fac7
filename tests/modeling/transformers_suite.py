"""transformers' common model tests on one kind of fold; `test_transformers_suite.py` runs this file for each kind."""

import importlib
import importlib.machinery
import importlib.util
import json
import os
import sys
import tempfile
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.auto import modeling_auto

from refold.modeling.configuration import RefoldConfig
from refold.modeling.model import RefoldForCausalLM
from refold.modeling.stack import RefoldModel
from refold.planning.plan import plan

TESTS, KIND = Path(os.environ["REFOLD_TRANSFORMERS_TESTS"]), os.environ["REFOLD_FOLD_KIND"]
KINDS: dict[str, Any] = {
    "strict": {"fold": {"loops": 2}},
    "relaxed": {"fold": {"loops": 2}, "relax": {"type": "lora", "rank": 3, "vectors": "own"}},
    "low rank": {"factor": {"parameters": 0.67}},
    "retention": {"mixers": [{"type": "retention", "depths": [1, 3]}]},
    "gated delta": {"mixers": [{"type": "gated_deltanet", "depths": [1, 3]}]},
    "shared keys": {"share_kv": {"from": "first_loop"}, "fold": {"loops": 2}},
}
STATES = ("retention", "gated delta")
MISSING = {
    "transformers_tests.exporters.test_export": "ExportTesterMixin",
    "transformers_tests.generation.test_utils": "GenerationTesterMixin",
}
"""Modules that the source distribution leaves out, and the class that the common tests import from each."""

INAPPLICABLE = {
    "test_num_layers_is_small": "two loops of two layers are the smallest fold that ties a pattern",
    "test_correct_missing_keys": "a folder that lacks weights is refused, not filled with random ones",
    "test_model_weights_reload_no_missing_tied_weights": "a folder that lacks weights is refused",
    "test_base_model_prefix_loads_base_weights": "a folder that lacks the head is refused",
    "test_bc_cache_name_forward": "both names of the cache are taken without a warning: older versions have the other",
}
"""Common tests that ask for another behaviour than a fold's, and the reason."""
INAPPLICABLE_TO_STATES = {
    "test_attention_outputs": "depths that keep a state have no attention weights to return",
}


def _load_common() -> ModuleType:
    """Imports the common tests from their folder, with empty classes for modules that are not there."""
    for package, folder in (
        ("transformers_tests", TESTS),
        ("transformers_tests.exporters", TESTS / "exporters"),
        ("transformers_tests.generation", TESTS / "generation"),
    ):
        module = ModuleType(package)
        module.__path__ = [str(folder)]
        sys.modules[package] = module
    for name, mixin in MISSING.items():
        if importlib.util.find_spec(name) is None:
            stand_in = ModuleType(name)
            setattr(stand_in, mixin, type(mixin, (), {}))
            sys.modules[name] = stand_in
    return importlib.import_module("transformers_tests.test_modeling_common")


common = _load_common()
# The common tests know by these tables which classes return a loss.
modeling_auto.MODEL_MAPPING_NAMES["refold"] = "RefoldModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["refold"] = "RefoldForCausalLM"
GenerationTesterMixin: type = sys.modules["transformers_tests.generation.test_utils"].GenerationTesterMixin


class FoldTester:
    """Makes small folds and inputs for them, as the common tests ask for."""

    batch_size, seq_length, is_training = 3, 7, True
    num_hidden_layers, hidden_size, num_attention_heads, vocab_size = 4, 32, 4, 99

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> RefoldConfig:
        source = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=48,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
        with tempfile.TemporaryDirectory() as folder:
            fields = {**source.to_dict(), "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
            (Path(folder) / "config.json").write_text(json.dumps(fields))
            blueprint = plan(folder, KINDS[KIND], allow_larger=True).blueprint
        return RefoldConfig(blueprint=blueprint.model_dump(mode="json"), pad_token_id=0, bos_token_id=1, eos_token_id=2)

    def prepare_config_and_inputs_for_common(self) -> tuple[RefoldConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.timeout(600)
class TestFold(common.ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (RefoldModel, RefoldForCausalLM)

    def setUp(self) -> None:
        inapplicable = INAPPLICABLE | (INAPPLICABLE_TO_STATES if KIND in STATES else {})
        if self._testMethodName in inapplicable:
            self.skipTest(inapplicable[self._testMethodName])
        self.model_tester = FoldTester(self)
