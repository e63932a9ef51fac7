"""Trains the small model that ships in `refold/shipped/`, from the standard library of the Python that runs `prepare`.

    python scripts/train_shipped_model.py prepare runs/shipped
    python scripts/train_shipped_model.py train runs/shipped      # again after an interruption: goes on from there
    python scripts/train_shipped_model.py train runs/longer --after runs/shipped --tokens 24000000 --lr 2e-3 --decay 0.5
    python scripts/train_shipped_model.py measure runs/shipped
    python scripts/train_shipped_model.py finish runs/shipped refold/shipped/stdlib-5m

`--after` goes on from a finished run with other settings; the tokens of both count. Only `prepare` needs refold; the
other three need torch, transformers, safetensors and numpy, so that they also run on another machine, on the prepared
folder alone. On CPUs set OMP_WAIT_POLICY=PASSIVE, and keep glibc from giving large
blocks back at every step: MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 2048
SEPARATOR = "<|endoftext|>"
CONTEXT = 512
STRIDE = 256
LOG_EVERY = 25  # steps
EVALUATE_EVERY = 250  # steps
CARD = Path(__file__).with_name("shipped_model_card.md")


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


def go_on_after(earlier: Path, run: Path) -> None:
    """Begins a run where another one ended: its data, its last checkpoint and its log."""
    if any(run.glob("checkpoint-*")):
        return
    for name in ("train.npy", "held_out.npy", "corpus.json", "training.jsonl"):
        shutil.copyfile(earlier / name, run / name)
    shutil.copytree(earlier / "tokenizer", run / "tokenizer", dirs_exist_ok=True)
    last = max(earlier.glob("checkpoint-*"))
    shutil.copytree(last, run / last.name)
    earlier_settings = json.loads((earlier / "settings.json").read_text())
    write_json(run / "earlier.json", earlier_settings)


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


def prepare(run: Path) -> None:
    """Writes `tokenizer/`, `train.npy` and `held_out.npy` (uint16 token ids) and `corpus.json` into `run`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from refold.studies.stdlib_corpus import HELD_OUT, held_out_documents, training_documents

    documents = {"train": list(training_documents()), "held_out": list(held_out_documents())}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents["train"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(run / "tokenizer")
    corpus: dict[str, object] = {"python": platform.python_version(), "held_out_modules": HELD_OUT}
    for name, texts in documents.items():
        ids: list[int] = []
        for text, encoding in zip(texts, bpe.encode_batch(texts), strict=True):
            assert bpe.decode(encoding.ids, skip_special_tokens=False) == text
            ids += [0, *encoding.ids]
        np.save(run / f"{name}.npy", np.array(ids, dtype=np.uint16))
        corpus[name] = {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts), "tokens": len(ids)}
    write_json(run / "corpus.json", corpus)
    print(json.dumps(corpus))


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


def blocked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    block: int = 128,
    **unused: object,
) -> tuple[Tensor, None]:
    """Causal attention by blocks of queries, each over the keys up to its end; two thirds faster on CPUs than sdpa.

    Args:
        query: [B, H, T, K]; key and value: [B, H / repeats, T, K].
    """
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    repeats = heads // groups
    query = (query * scaling).reshape(batch, groups, repeats, length, size)
    outputs = []
    for start in range(0, length, block):
        end = min(length, start + block)
        rows = query[:, :, :, start:end].reshape(batch * groups, repeats * (end - start), size)
        scores = rows @ key[:, :, :end].reshape(batch * groups, end, size).transpose(1, 2)
        future = torch.full((end - start, end - start), float("-inf"), dtype=scores.dtype, device=scores.device).triu(1)
        scores = scores.view(-1, repeats, end - start, end) + functional.pad(future, (start, 0))
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype).view(-1, repeats * (end - start), end)
        output = weights @ value[:, :, :end].reshape(batch * groups, end, size)
        outputs.append(output.view(batch, groups, repeats, end - start, size))
    return torch.cat(outputs, 3).reshape(batch, heads, length, size).transpose(1, 2), None


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


def copy_weights(path: Path, model: nn.Module) -> None:
    weights = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


@torch.no_grad()
def measure_bits(model: LlamaForCausalLM, tokens: Tensor, stride: int, batch: int = 64) -> float:
    """Returns the bits of all tokens but the first, each scored once with up to `CONTEXT` tokens in view."""
    model.eval()
    starts = [*range(0, len(tokens) - CONTEXT, stride), len(tokens) - CONTEXT]
    known = [0, *(start + CONTEXT - 1 for start in starts[:-1])]  # the last token scored before each window
    first = torch.tensor([before - start for before, start in zip(known, starts, strict=True)], device=tokens.device)
    assert int(first.min()) >= 0, "every token is the target of some window"
    offsets = torch.arange(CONTEXT, device=tokens.device)
    nats = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for rows in torch.arange(len(starts)).split(batch):
        begin = torch.tensor(starts, device=tokens.device)[rows[0] : rows[-1] + 1, None]
        window = tokens[begin + offsets].long()
        logits = model(input_ids=window, use_cache=False).logits[:, :-1].float()
        losses = functional.cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="none")
        nats += losses[offsets[:-1] >= first[rows[0] : rows[-1] + 1, None]].double().sum()
    return nats.item() / math.log(2)


def measure(run: Path, device: str) -> None:
    """Writes `measurements.json`: held-out bits per byte in bf16, whole and with layers left out.

    Each layer and each pair is tried on every 16th window; the two pairs that cost least then on all.
    """
    _, tokens, num_bytes = load_tokens(run, device)
    sample = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)[::16].flatten()
    sample_bytes = num_bytes * len(sample) / len(tokens)
    model = final_model(run)
    nn.Module.to(model, device)
    layers = list(model.model.layers)

    def leave_out(without: tuple[int, ...]) -> LlamaForCausalLM:
        model.model.layers = nn.ModuleList(layer for i, layer in enumerate(layers) if i not in without)
        model.config.num_hidden_layers = len(model.model.layers)
        return model

    def on_sample(*without: int) -> float:
        return measure_bits(leave_out(without), sample, CONTEXT - 1, batch=16) / sample_bytes

    def on_all(*without: int) -> float:
        return measure_bits(leave_out(without), tokens, STRIDE, batch=16) / num_bytes

    whole = on_sample()
    singles = [on_sample(i) - whole for i in range(len(layers))]
    pairs = {pair: on_sample(*pair) - whole for pair in itertools.combinations(range(len(layers)), 2)}
    least = sorted(pairs, key=lambda pair: pairs[pair])[:2]
    whole = on_all()
    without_pair, best = min((on_all(*pair) - whole, pair) for pair in least)
    result = {
        "held_out_bits_per_byte": round(whole, 4),
        "without_layer": [round(loss, 4) for loss in singles],
        "least_important_pair": list(best),
        "without_pair": round(without_pair, 4),
    }
    write_json(run / "measurements.json", result)
    print(json.dumps(result), flush=True)


def final_model(run: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM(llama_config())
    copy_weights(run / "final.safetensors", model)
    nn.Module.to(model, torch.bfloat16)
    return model


def finish(run: Path, out: Path, machine: str | None) -> None:
    """Writes the model folder with its card, from what the other three commands left in `run`."""
    out.mkdir(parents=True, exist_ok=True)
    model = final_model(run)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    PreTrainedTokenizerFast.from_pretrained(run / "tokenizer").save_pretrained(out)
    lines = (run / "training.jsonl").read_text().splitlines(keepends=True)
    thin = math.ceil(len(lines) / 400)
    kept = [line for i, line in enumerate(lines) if i % thin == 0 or "held_out" in line]
    (out / "training.jsonl").write_text("".join(kept))
    settings = Settings(**json.loads((run / "settings.json").read_text()))
    corpus, measured, recorded = (
        json.loads((run / f"{name}.json").read_text()) for name in ("corpus", "measurements", "machine")
    )
    card = CARD.read_text().format(
        parameters=sum(p.numel() for p in model.parameters()),
        modules=", ".join(f"`{name}`" for name in corpus["held_out_modules"]),
        layer_rows="\n".join(f"| {i} | {loss:+.3f} |" for i, loss in enumerate(measured["without_layer"])),
        pair=" and ".join(str(i) for i in measured["least_important_pair"]),
        settings=settings,
        config=model.config,
        context=CONTEXT,
        half=CONTEXT // 2,
        stride=STRIDE,
        epochs=settings.tokens / corpus["train"]["tokens"],
        corpus=corpus,
        measured=measured,
        machine=machine or recorded["machine"],
        hours=json.loads(lines[-1])["seconds"] / 3600,
    )
    (out / "README.md").write_text(card)


def load_tokens(run: Path, device: str) -> tuple[Tensor, Tensor, int]:
    """Returns the training and the held-out token ids [tokens], and the number of held-out bytes."""
    train_ids, held_out = (
        torch.from_numpy(np.load(run / f"{name}.npy").astype(np.int32)).to(device) for name in ("train", "held_out")
    )
    return train_ids, held_out, json.loads((run / "corpus.json").read_text())["held_out"]["bytes"]


def save_atomic(tensors: dict[str, Tensor], path: Path) -> None:
    new = path.with_suffix(".tmp")
    save_file(tensors, new)
    os.replace(new, path)


def write_json(path: Path, value: object) -> None:
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(new, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "train", "measure", "finish"):
        command = commands.add_parser(name)
        command.add_argument("run", type=Path, help="folder of this training run")
        if name == "finish":
            command.add_argument("out", type=Path, help="model folder to write")
            command.add_argument("--machine", help="what it was trained on, in words, for the card")
        if name in ("train", "measure"):
            command.add_argument("--device", default=device, choices=("cuda", "cpu"))
        if name == "train":
            for field in dataclasses.fields(Settings):
                command.add_argument(
                    f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default
                )
            command.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
            command.add_argument("--after", type=Path, help="run folder to go on from")
            command.add_argument("--checkpoint-every", type=int, default=100, help="steps")
    given = parser.parse_args()
    given.run.mkdir(parents=True, exist_ok=True)
    if given.command == "prepare":
        prepare(given.run)
    elif given.command == "train":
        settings = Settings(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Settings)})
        if given.after is not None:
            go_on_after(given.after, given.run)
        train(given.run, settings, given.device, given.compile, given.checkpoint_every)
    elif given.command == "measure":
        measure(given.run, given.device)
    else:
        finish(given.run, given.out, given.machine)


if __name__ == "__main__":
    main()
