"""What tells one model's weights from another's, whether they came from a folder or were made here."""

import hashlib
import json

import torch
from torch import Tensor
from transformers import PreTrainedModel

_SAMPLED = 64
_WORD_BYTES = 8
# What a config says of where the model came from and how it is run, not of what it computes.
_PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "auto_map")


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Returns 64 hex digits that differ between models with other weights, dtypes or configs.

    Every weight is read once: adapters that were swapped, or weights that were trained on, make another model. The same
    weights give the same digits on every device.

    Args:
        model: Loaded, folded or not.
    """
    settings = {name: value for name, value in model.config.to_diff_dict().items() if name not in _PASSING}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.named_parameters(), key=lambda each: each[0]):
        total, sample = _summarise(tensor)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {total} {sample}\n".encode())
    return digest.hexdigest()


def _summarise(tensor: Tensor) -> tuple[int, list[int]]:
    """The sum of all bytes, eight at a time and modulo 2^64, and some of them, so that their order counts as well."""
    data = tensor.detach().contiguous()
    # Words must begin where words do, which a view into a larger tensor need not.
    data = (data.clone() if data.storage_offset() else data).view(-1).view(torch.uint8)
    whole = data.numel() // _WORD_BYTES * _WORD_BYTES
    words = data[:whole].view(torch.int64)
    sample = words[:: max(1, words.numel() // _SAMPLED)].tolist()
    return int(words.sum()), sample + data[whole:].tolist()
