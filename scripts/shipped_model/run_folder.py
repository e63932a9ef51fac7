"""The folder of a training run: the model's shape, the run's settings, and the files its commands hand each other."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 2048
CONTEXT = 512


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a training run is made of; a run folder resumes only with the settings that it was started with.

    `tokens` alone may change on the way, as long as the rate has not begun to fall.
    """

    tokens: int = 10_000_000
    batch: int = 4096  # tokens
    lr: float = 4e-3
    warmup: int = 100  # steps
    decay: float = 0.4  # share of the steps, at the end, in which the rate falls linearly to zero
    short: float = 0.85  # share of the steps, at the start, with windows of half the context
    weight_decay: float = 0.1  # of the matrices; the norms have none
    seed: int = 0

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.batch)

    def lr_at(self, step: int) -> float:
        left = (self.steps - step) / max(1, self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup, left)

    def context_at(self, step: int) -> int:
        return CONTEXT // 2 if step < self.short * self.steps else CONTEXT


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )


def load_tokens(run: Path, device: str) -> tuple[Tensor, Tensor, int]:
    """Returns the training and the held-out token ids [tokens], and the number of held-out bytes."""
    train_ids, held_out = (
        torch.from_numpy(np.load(run / f"{name}.npy").astype(np.int32)).to(device) for name in ("train", "held_out")
    )
    return train_ids, held_out, json.loads((run / "corpus.json").read_text())["held_out"]["bytes"]


def copy_weights(path: Path, model: nn.Module) -> None:
    weights = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def final_model(run: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM(llama_config())
    copy_weights(run / "final.safetensors", model)
    nn.Module.to(model, torch.bfloat16)
    return model


def save_atomic(tensors: dict[str, Tensor], path: Path) -> None:
    new = path.with_suffix(".tmp")
    save_file(tensors, new)
    os.replace(new, path)


def write_json(path: Path, value: object) -> None:
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(new, path)
