from types import SimpleNamespace

import torch

from refold.healing.prepared import CPU_BYTES, choose_micro_batch

CPU = torch.device("cpu")


def _config(scale):
    return SimpleNamespace(num_hidden_layers=12, hidden_size=256 * scale, intermediate_size=704 * scale)


def test_a_wish_is_granted():
    assert choose_micro_batch(7, 512, _config(1), CPU) == 7


def test_larger_models_and_contexts_get_fewer_sequences():
    sizes = [
        choose_micro_batch(None, context, _config(scale), CPU) for context, scale in ((128, 1), (512, 1), (512, 4))
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] * 128 * 4 * 12 * (16 * 256 + 5 * 704) <= CPU_BYTES
    assert sizes[-1] == 1
