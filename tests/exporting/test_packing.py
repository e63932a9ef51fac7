from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from refold.checkpoint.expected_tensors import ExpectedTensors
from refold.checkpoint.locate import locate
from refold.checkpoint.reader import CheckpointReader
from refold.exporting.stock.dense_folder import pack_pieces
from refold.families.arch import Layout, TensorRule
from refold.families.registry import find_family, read_arch
from refold.sources.pieces import PieceReader
from refold.sources.source_model import SourceModel

NAMES = tuple(f"mixer.{name}.{{kind}}" for name in ("q_proj", "k_proj", "v_proj"))


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("layout", ["rows", "heads"])
def test_pieces_packed_are_read_back_as_they_were(layout: Layout, kind: str, tmp_path: Path):
    arch = read_arch(
        {
            "model_type": "llama",
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            # Only rows of different sizes show an order that is wrong.
            "num_key_value_heads": 2 if layout == "rows" else 4,
            "num_hidden_layers": 1,
            "attention_bias": True,
        }
    )
    names = tuple(name.format(kind=kind) for name in NAMES)
    rule = TensorRule("fused", names, layout)
    rows = [32, 8 * arch.num_key_value_heads, 8 * arch.num_key_value_heads]
    pieces = [torch.randn(count, *([32] if kind == "weight" else [])) for count in rows]
    packed = pack_pieces(layout, pieces, arch.head_dim)
    save_file({"fused": packed}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    family = replace(find_family("llama"), rules=(rule,))
    located = locate(tmp_path)
    model = SourceModel(located, "float32", ExpectedTensors(located.where, arch, family, None, {}))
    with CheckpointReader(tmp_path) as checkpoint:
        reader = PieceReader(model, checkpoint)
        for name, piece in zip(names, pieces, strict=True):
            assert torch.equal(reader.read(name, None, torch.float32), piece)


def test_heads_are_interleaved_as_gpt_neox_does():
    pieces = [torch.tensor([value, value + 1, value + 2, value + 3]) for value in (0, 10, 20)]
    assert pack_pieces("heads", pieces, 2).tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]


def test_a_whole_tensor_is_itself():
    tensor = torch.randn(3, 2)
    assert pack_pieces("whole", [tensor], 2) is tensor
