"""A Llama source with random weights and a tokenizer of bytes and pairs of bytes, for measurements of time."""

from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_source(folder: Path, shape: dict[str, Any], seed: int, context: int, dtype: str = "float32") -> None:
    """Writes a source.

    Args:
        folder: Where to write.
        shape: Sizes for its config.
        seed: Of the weights.
        context: Number of positions.
        dtype: Of the weights.
    """
    torch.manual_seed(seed)
    sizes = {**shape, "max_position_embeddings": context}
    config = LlamaConfig(**sizes, initializer_range=0.1, dtype=dtype, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    # Prompts are token ids; engines want a tokenizer all the same.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(islice(product(alphabet, alphabet), shape["vocab_size"] - len(alphabet)))
    tokens = [*alphabet, *(one + other for one, other in merges)]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
