"""Training, resumable: Muon and AdamW on windows drawn from (seed, step)."""

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, LlamaForCausalLM

from shipped_model.attention import blocked_attention
from shipped_model.measuring import measure_bits
from shipped_model.run_folder import CONTEXT, Settings, copy_weights, llama_config, load_tokens, save_atomic, write_json

LOG_EVERY = 25  # steps
EVALUATE_EVERY = 250  # steps


def train(run: Path, settings: Settings, device: str, compile_layers: bool, checkpoint_every: int) -> None:
    """Trains to the end, from the latest checkpoint in `run` where there is one, and writes `final.safetensors`."""
    recorded = run / "settings.json"
    if recorded.exists() and Settings(**json.loads(recorded.read_text()) | {"tokens": settings.tokens}) != settings:
        sys.exit(f"{recorded}: resuming requires the settings of the start (got other ones); use another folder")
    write_json(recorded, dataclasses.asdict(settings))

    torch.manual_seed(settings.seed)
    AttentionInterface.register("blocked", blocked_attention)
    model = LlamaForCausalLM(llama_config())
    nn.Module.to(model, device)
    if device == "cpu":
        model.config._attn_implementation = "blocked"
    if compile_layers:  # one layer at a time: they share one compiled graph
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    optimizers = make_optimizers(model, settings)
    first, seconds = resume(run, model, optimizers)

    tokens, held_out, held_out_bytes = load_tokens(run, device)
    total, counted, started = torch.zeros((), device=device), 0, time.perf_counter() - seconds
    for step in range(first, settings.steps):
        model.train()
        context = settings.context_at(step)
        rng = np.random.default_rng((settings.seed, step))
        starts = torch.from_numpy(rng.integers(len(tokens) - context, size=settings.batch // context)).to(device)
        window = tokens[starts[:, None] + torch.arange(context + 1, device=device)].long()
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(input_ids=window[:, :-1], use_cache=False).logits
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.lr_at(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        total, counted = total + loss.detach(), counted + 1
        done = step + 1
        if done % LOG_EVERY == 0 or done == settings.steps:
            line: dict[str, float] = {"step": done, "tokens": done * settings.batch, "lr": settings.lr_at(step)}
            line |= {"loss": round(total.item() / counted, 4), "seconds": round(time.perf_counter() - started, 1)}
            if done % EVALUATE_EVERY == 0 or done == settings.steps:
                sample = held_out if done == settings.steps else held_out[: len(held_out) // 8]
                share = held_out_bytes * len(sample) / len(held_out)
                with torch.autocast(device, dtype=torch.bfloat16), torch.compiler.set_stance("force_eager"):
                    line["held_out_bits_per_byte"] = round(measure_bits(model, sample, stride=CONTEXT - 1) / share, 4)
            with (run / "training.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            total, counted = torch.zeros((), device=device), 0
        if done % checkpoint_every == 0 or done == settings.steps:
            save_checkpoint(run, done, model, optimizers)
    state = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_atomic(state, run / "final.safetensors")
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU cores"
    write_json(run / "machine.json", {"machine": machine, "torch": str(torch.__version__)})


def make_optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Returns Muon for the layers' matrices, which needs far fewer tokens than AdamW, and AdamW for all else."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and ".layers." in name]
    vectors = [p for p in named.values() if p.ndim == 1]
    embedding = [p for name, p in named.items() if p.ndim == 2 and ".layers." not in name]
    return [
        torch.optim.Muon(matrices, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": embedding, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(0.9, 0.95),
        ),
    ]


def save_checkpoint(run: Path, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Writes `checkpoint-STEP`, whole or not at all, and removes the one before it."""
    folder, new = run / f"checkpoint-{step:08d}", run / "checkpoint.tmp"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    save_file({name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}, new / "model.safetensors")
    moments = {
        f"{which}:{index}:{key}": value.cpu().contiguous()
        for which, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    save_file(moments, new / "optimizers.safetensors")
    write_json(new / "state.json", {"step": step})
    new.rename(folder)
    for old in sorted(run.glob("checkpoint-*"))[:-1]:
        shutil.rmtree(old)


def resume(run: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Loads the latest checkpoint and returns the steps done and the seconds taken; zeros without one."""
    log = run / "training.jsonl"
    checkpoints = sorted(run.glob("checkpoint-*"))
    if not checkpoints:
        log.write_text("")
        return 0, 0.0
    step = json.loads((checkpoints[-1] / "state.json").read_text())["step"]
    copy_weights(checkpoints[-1] / "model.safetensors", model)
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, value in load_file(checkpoints[-1] / "optimizers.safetensors").items():
        which, index, key = name.split(":")
        states[int(which)].setdefault(int(index), {})[key] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
    log.write_text("".join(line + "\n" for line in lines))
    print(f"resuming after step {step}", flush=True)
    return step, json.loads(lines[-1])["seconds"] if lines else 0.0
