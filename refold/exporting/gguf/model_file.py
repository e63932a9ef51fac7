"""A whole model as one GGUF file, or as an adapter file beside the file of its base."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from refold.blueprint.owned.registry import OWNED
from refold.blueprint.schema import Blueprint
from refold.blueprint.tensors import target_tensors
from refold.checkpoint.card import read_licence
from refold.checkpoint.provenance import Stage
from refold.errors import ExportError
from refold.exporting.gguf.adapter_file import adapter_contents, base_contents
from refold.exporting.gguf.choice import choose_contents
from refold.exporting.gguf.contents import FieldValue, GgufContents
from refold.exporting.gguf.file_writer import QUANTISATION_VERSION, write_gguf
from refold.exporting.gguf.number_formats import DTYPE_FORMATS, FORMATS, choose_formats
from refold.exporting.gguf.stored_formats import stored_formats
from refold.exporting.gguf.vocabulary import read_vocabulary
from refold.exporting.opened import TensorSource
from refold.exporting.stack_weights import StackWeights
from refold.exporting.target import ExportOptions
from refold.exporting.unrolled import without_adapters


@runtime_checkable
class ReadableModel(Protocol):
    """A model that is open for reading: an export's job, or an opened model."""

    @property
    def name(self) -> str: ...
    @property
    def blueprint(self) -> Blueprint: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def reader(self) -> TensorSource: ...
    @property
    def folder(self) -> Path: ...


def write_model_file(
    model: ReadableModel, options: ExportOptions, path: Path, stages: Sequence[Stage] = ()
) -> tuple[str, ...]:
    """Writes weights, tokenizer and chat template into one file.

    Args:
        model: The model.
        options: Number formats, with the dtype set.
        path: The file.
        stages: The stages that made the model, if no provenance stands beside the file.

    Returns:
        Sentences for the model card.

    Raises:
        ExportError: llama.cpp cannot hold the model or its tokenizer; or a tensor of the model has no place.
        SourceError: The model's files are damaged.
    """
    choice = choose_contents(model.blueprint)
    if choice.contents is None:
        reasons = "; ".join(f"{each.required} ({each.got})" for each in choice.obstacles)
        raise ExportError(f"export: gguf cannot hold this model: {reasons}; see `refold export --list`")
    weights = StackWeights(model.blueprint, model.reader, pads=not choice.contents.has_own_widths)
    notes = write_contents(model, options, path, (choice.contents, weights), stages)
    exits = {tensor.name for tensor in target_tensors(model.blueprint) if tensor.kind.place == "exits"}
    unread = [name for name in model.reader.unread() if name not in exits]
    if unread:
        raise ExportError(
            f"export: {len(unread)} of the model's tensors have no place: {', '.join(unread[:5])}; convert the source "
            f"again"
        )
    return (*notes, *(sentence for kind in OWNED for sentence in kind.lost(model.blueprint)))


def write_contents(
    model: ReadableModel,
    options: ExportOptions,
    path: Path,
    what: tuple[GgufContents, StackWeights],
    stages: Sequence[Stage] = (),
) -> tuple[str, ...]:
    """Writes contents chosen before, with the model's tokenizer; see `write_model_file`.

    Args:
        model: The model.
        options: Number formats, with the dtype set.
        path: The file.
        what: The contents, and the reader of their weights.
        stages: The stages that made the model.
    """
    contents, weights = what
    stored = stored_formats(contents, weights.blueprint, options)
    formats = choose_formats(contents, options, stored.by_name)
    vocabulary = read_vocabulary(model.folder, model.config, model.blueprint.arch.vocab_size)
    plain = options.quantise or formats.commonest(contents)
    fields: dict[str, FieldValue] = {
        "general.type": "model",
        **name_field(model.name, vocabulary.fields),
        "general.file_type": FORMATS[plain].file_type,
        "general.quantization_version": QUANTISATION_VERSION,
    }
    licence = read_licence(model.folder)
    if licence is not None:
        fields["general.license"] = licence
    if stages:
        fields["refold.provenance"] = json.dumps([asdict(stage) for stage in stages], default=str)
    num_copied = write_gguf(path, contents, formats.by_name, {**fields, **vocabulary.fields}, weights)
    architecture = f"llama.cpp's architecture {contents.architecture}, matrices in {plain}"
    copied = (f"{num_copied} matrices have the model's own integers, which were not rounded again",) * (num_copied > 0)
    return (architecture, *stored.notes, *copied, *contents.notes, *formats.notes, *vocabulary.notes)


PHI3_TOKENS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}


def name_field(name: str, vocabulary: Mapping[str, FieldValue]) -> dict[str, FieldValue]:
    """Returns the name of the model, unless llama.cpp would treat its tokenizer as that of Phi-3 because of it.

    llama.cpp looks for `phi-3` in the name, and for Phi-3's tokens in the vocabulary, without which it does not load.
    """
    tokens = vocabulary.get("tokenizer.ggml.tokens", [])
    is_phi3 = any(each in name.lower() for each in ("phi-3", "phi3"))
    return {} if is_phi3 and not (isinstance(tokens, list) and set(tokens) >= PHI3_TOKENS) else {"general.name": name}


def write_adapter(
    model: ReadableModel, options: ExportOptions, path: Path, stages: Sequence[Stage] = ()
) -> tuple[str, ...]:
    """Writes the LoRAs of a model as an adapter file.

    Args:
        model: The model.
        options: Number formats, with the dtype set.
        path: The file.
        stages: The stages that made the model, if no provenance stands beside the file.

    Returns:
        Sentences about the file.

    Raises:
        SourceError: The model's files are damaged.
    """
    contents = adapter_contents(model.blueprint)
    assert options.dtype is not None
    number = DTYPE_FORMATS[options.dtype]
    fields: dict[str, FieldValue] = {"general.name": model.name}
    if stages:
        fields["refold.provenance"] = json.dumps([asdict(stage) for stage in stages], default=str)
    formats = {tensor.name: number for tensor in contents.tensors}
    write_gguf(path, contents, formats, fields, StackWeights(model.blueprint, model.reader))
    return (f"{len(contents.tensors) // 2} LoRAs in {number}, for a base of architecture {contents.architecture}",)


def write_base(model: ReadableModel, options: ExportOptions, path: Path) -> tuple[str, ...]:
    """Writes the base that adapters of the same blocks go with; it is the same for all of them."""
    contents = base_contents(model.blueprint)
    weights = StackWeights(without_adapters(model.blueprint), model.reader, pads=not contents.has_own_widths)
    return write_contents(model, options, path, (contents, weights))
