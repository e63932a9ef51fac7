"""The folder of a healed model: the files of the original, new weights, a longer provenance and the log."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from refold.checkpoint import provenance
from refold.checkpoint.card import CARD_NAME, FOLDED_USAGE, STOCK_USAGE, read_licence, write_card
from refold.checkpoint.companions import copy_companions
from refold.checkpoint.folder import AtomicFolder
from refold.checkpoint.locate import CONFIG_NAME, PLAN_NAME, Source
from refold.checkpoint.writer import ShardedWriter, TensorSpecs
from refold.healing.log import LOG_NAME
from refold.modeling.model import RefoldForCausalLM
from refold.recipe.heal import HealStage

_ROW = re.compile(r"^\| ([^|]+) \| ([^|]*) \|$", re.MULTILINE)


def tensor_specs(student: nn.Module) -> TensorSpecs:
    """Returns name, shape and dtype of every parameter; tied parameters occur once, under their first name.

    Quantised weights are held as they are stored from then on, not as a kernel reads them.
    """
    if isinstance(student, RefoldForCausalLM):
        student.hold_integers()
    return {name: (tuple(value.shape), value.dtype) for name, value in student.named_parameters()}


def write_healed(
    out: AtomicFolder,
    model: Source,
    weights: Mapping[str, Tensor],
    specs: TensorSpecs,
    stages: Sequence[provenance.Stage],
    facts: Mapping[str, str],
    log: Path,
) -> None:
    """Writes all files except the manifest, which the atomic folder adds.

    Config, plan, tokenizer and licence are copied from the original model. A folded model has the same tensor names in
    memory and in its file; a source gets the names that transformers uses and loads.

    Args:
        out: the unfinished folder.
        model: the model before training.
        weights: the trained weights, in float32, by name.
        specs: shapes of the tensors, and the dtypes to store.
        stages: new entries of the provenance.
        facts: rows of the model card.
        log: the training log.

    Raises:
        FolderError: the folder cannot be written.
    """
    folder = model.fetch_companions()
    with ShardedWriter(out.path, specs) as writer, torch.no_grad():
        for name, value in weights.items():
            writer.write(name, value.to(specs[name][1]))
    out.hashes.update(writer.hashes)
    for name in (CONFIG_NAME, PLAN_NAME):
        if (folder / name).exists():
            shutil.copyfile(folder / name, out.path / name)
    copy_companions(folder, out.path)
    shutil.copyfile(log, out.path / LOG_NAME)
    history = [*provenance.read(folder), *stages]
    provenance.write(out.path, history)
    base = _base_model(history, model)
    is_folded = (folder / PLAN_NAME).exists()
    title = f"{base}, folded and healed" if is_folded else f"{base}, trained further"
    usage = FOLDED_USAGE if is_folded else STOCK_USAGE
    write_card(out.path, base, title, {**_card_facts(folder), **facts}, licence=read_licence(folder), usage=usage)


def describe(stages: Sequence[HealStage], losses: Mapping[str, float]) -> dict[str, str]:
    """Returns the rows that a run adds to the model card: its stages and final losses, in nats per token."""
    done = "; ".join(
        f"{' + '.join(stage.objective.chosen())}, {stage.tokens:,} tokens, {stage.batch_tokens or 0:,} a step, "
        f"learning rate {stage.learning_rate or 0:g}"
        for stage in stages
    )
    return {"healing": done} | {f"training {name.replace('_', ' ')}": f"{value:.3f}" for name, value in losses.items()}


def _base_model(stages: Sequence[provenance.Stage], model: Source) -> str:
    first = stages[0].source
    return first.get("id") or Path(first.get("path") or model.where).name


def _card_facts(folder: Path) -> dict[str, str]:
    """Returns the rows of the folder's model card; none if the card was not written by refold."""
    card = folder / CARD_NAME
    if not (folder / provenance.PROVENANCE_NAME).exists() or not card.exists():
        return {}
    return {name: value for name, value in _ROW.findall(card.read_text(encoding="utf-8")) if name.strip()}
