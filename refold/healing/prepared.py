"""A stage with everything it asks for found, loaded and decided."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from refold.blueprint.recipe import HealStage
from refold.checkpoint import provenance
from refold.checkpoint.locate import Source, locate
from refold.checkpoint.manifest import hash_file
from refold.data.readers import DataSource, open_data
from refold.data.tokens import TokenisedDocuments, tokenise
from refold.errors import DataError, HealError
from refold.healing.micro_batch import choose_micro_batch
from refold.healing.objectives.registry import OBJECTIVES
from refold.healing.precision import attend_in_float32, choose_precision
from refold.healing.student import Teacher
from refold.modeling.configuration import MODEL_TYPE
from refold.modeling.load import load_model, load_tokenizer
from refold.scoring.head import check_same_vocabulary
from refold.scoring.predict import head_of

DEFAULT_CONTEXT = 1024
Data = str | Path | Sequence[str | Path] | DataSource


@dataclass(frozen=True)
class PreparedRun:
    """What one stage trains with.

    Attributes:
        stage: with `context`, `precision` and `micro_batch` decided.
        student: in float32.
        teacher: None where the objective needs none.
        tokenised: the text, up to the stage's tokens.
        device: where both models are.
        autocast: dtype of matrix products, None for float32.
        identity: everything the result depends on, see `Checkpoints`.
    """

    stage: HealStage
    student: PreTrainedModel
    teacher: Teacher | None
    tokenised: TokenisedDocuments
    device: torch.device
    autocast: torch.dtype | None
    identity: dict[str, Any]


def prepare(
    model: Source,
    student: PreTrainedModel,
    teacher: str | Path | Source | None,
    data: Data,
    stage: HealStage,
    work: Path,
    device: torch.device,
) -> PreparedRun:
    """Finds and loads what a stage needs; arguments and errors as for `heal`.

    Args:
        model: where the student comes from.
        student: loaded, in float32, on the device.
        teacher: what the user named.
        data: files, folders or an opened source.
        stage: as the recipe has it.
        work: keeps the tokens.
        device: where to train.
    """
    stage = _decide(stage, student, device)
    autocast = torch.bfloat16 if stage.precision == "bfloat16" else None
    if autocast is not None and device.type == "cpu":
        attend_in_float32(student)
    identity: dict[str, Any] = {**stage.model_dump(mode="json"), "model weights": _hash_weights(model)}
    loaded = None
    if OBJECTIVES[stage.objective].needs_teacher:
        found = _find_teacher(model, teacher)
        loaded = load_model(found, device=device)
        check_same_vocabulary(head_of(student), head_of(loaded))
        identity["teacher"] = found.fingerprint()
    elif teacher is not None:
        raise HealError(
            f"teacher: only `objective: distil` has one (got {teacher} with {stage.objective}); leave it out"
        )
    source = data if isinstance(data, DataSource) else open_data(data)
    tokenised = tokenise(
        source, load_tokenizer(model), budget=stage.tokens, seed=stage.seed, cache_folder=work / "tokens"
    )
    _require_known_tokens(tokenised, head_of(student).vocab_size, source.name)
    digest = hashlib.sha256(tokenised.tokens.tobytes() + tokenised.offsets.tobytes())
    identity["data"] = digest.hexdigest()
    frozen = None if loaded is None else Teacher(loaded, autocast)
    return PreparedRun(stage, student, frozen, tokenised, device, autocast, identity)


def _decide(stage: HealStage, student: PreTrainedModel, device: torch.device) -> HealStage:
    """Fills in what the stage leaves open."""
    config: Any = student.config
    context = stage.context or max(2, min(DEFAULT_CONTEXT, config.max_position_embeddings, stage.tokens))
    autocast = choose_precision(stage.precision, device, config.hidden_size)
    precision = "float32" if autocast is None else "bfloat16"
    micro_batch = choose_micro_batch(stage.micro_batch, context, config, device)
    return stage.model_copy(update={"context": context, "precision": precision, "micro_batch": micro_batch})


def _find_teacher(model: Source, wish: str | Path | Source | None) -> Source:
    if wish is not None:
        return wish if isinstance(wish, Source) else locate(wish)
    if model.read_config().get("model_type") == MODEL_TYPE:
        return provenance.teacher(model.fetch())
    return model


def _hash_weights(model: Source) -> str:
    headers = model.headers()
    assert headers is not None
    folder = model.fetch()
    return hashlib.sha256("".join(hash_file(folder / name) for name in sorted(headers.files)).encode()).hexdigest()


def _require_known_tokens(tokenised: TokenisedDocuments, vocab_size: int, name: str) -> None:
    largest = int(tokenised.tokens.max())
    if largest >= vocab_size:
        raise DataError(
            f"{name}: tokens below the model's {vocab_size} are required (got {largest}); use the tokenizer the model "
            f"was trained with"
        )
