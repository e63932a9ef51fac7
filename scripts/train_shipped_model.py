"""Trains the small model that ships in `refold/shipped/`, from the standard library of the Python that runs `prepare`.

    python scripts/train_shipped_model.py prepare runs/shipped
    python scripts/train_shipped_model.py train runs/shipped      # again after an interruption: goes on from there
    python scripts/train_shipped_model.py measure runs/shipped
    python scripts/train_shipped_model.py finish runs/shipped refold/shipped/stdlib-5m

Only `prepare` needs refold; the other three need torch, transformers, safetensors and numpy, so that they also run on
another machine, on the prepared folder and `scripts/` alone. On CPUs set OMP_WAIT_POLICY=PASSIVE, and keep glibc from
giving large blocks back at every step: MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000.
"""

import argparse
import dataclasses
import json
import math
import platform
from pathlib import Path

import numpy as np
import torch
from shipped_model.measuring import STRIDE, measure
from shipped_model.run_folder import CONTEXT, VOCAB_SIZE, Settings, final_model, write_json
from shipped_model.training import train
from transformers import GenerationConfig, PreTrainedTokenizerFast

SEPARATOR = "<|endoftext|>"
CARD = Path(__file__).parent / "shipped_model" / "card.md"


def prepare(run: Path) -> None:
    """Writes `tokenizer/`, `train.npy` and `held_out.npy` (uint16 token ids) and `corpus.json` into `run`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from refold.studies.shipped import HELD_OUT, held_out_documents, training_documents

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
            command.add_argument("--checkpoint-every", type=int, default=100, help="steps")
    given = parser.parse_args()
    given.run.mkdir(parents=True, exist_ok=True)
    if given.command == "prepare":
        prepare(given.run)
    elif given.command == "train":
        settings = Settings(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Settings)})
        train(given.run, settings, given.device, given.compile, given.checkpoint_every)
    elif given.command == "measure":
        measure(given.run, given.device)
    else:
        finish(given.run, given.out, given.machine)


if __name__ == "__main__":
    main()
