"""A source model: its config, family and headers, and the record of it that is written down."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from refold.blueprint.source_tensors import SourcePiece, SourceTensor, locate_piece, source_tensors
from refold.checkpoint.headers import CheckpointHeaders
from refold.checkpoint.locate import Source, locate
from refold.errors import RecipeError, SourceError
from refold.families.arch import ArchSpec, Frozen
from refold.families.family import Family
from refold.families.registry import find_family, read_arch
from refold.recipe.recipe import IgnoredTensor
from refold.suggest import did_you_mean, must_be_one_of

STORED_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Safetensors name to torch name of the dtypes weights may have."""
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
TIED_HEAD_REASON = "the head is the embedding (tie_word_embeddings)"
NUM_NAMED = 5
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class SourceModel:
    """A source checkpoint and what its config and headers say.

    Attributes:
        source: Where it lies.
        arch: Its architecture.
        family: How its checkpoints are read.
        dtype: Torch name of the dtype most of its numbers have.
        headers: Its tensors; None where only `config.json` is there.
        expected: The tensors its architecture must have, by name.
    """

    source: Source
    arch: ArchSpec
    family: Family
    dtype: str
    headers: CheckpointHeaders | None
    expected: Mapping[str, SourceTensor]

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    def locate(self, canonical: str, layer: int | None = None) -> SourcePiece:
        """Finds a canonical tensor, such as `mixer.q_proj.weight`, in this checkpoint."""
        piece = locate_piece(self.family, canonical, layer)
        if canonical == EMBEDDING and piece.name not in self.expected:
            return SourcePiece(locate_piece(self.family, HEAD).name, piece.rule, piece.index)
        return piece

    def check_tensors(self, ignore: Sequence[IgnoredTensor] = ()) -> dict[str, tuple[str, str]]:
        """Holds the checkpoint's tensors against those the architecture must have.

        Args:
            ignore: The recipe's `ignore_tensors`.

        Returns:
            The tensors that are left out: name to the pattern that matched and the reason. Empty without headers.

        Raises:
            RecipeError: A pattern of `ignore` matches nothing.
            SourceError: A tensor has no place, is missing, or has the wrong shape.
        """
        if self.headers is None:
            return {}
        names, where = self.headers.tensors, self.source.where
        ignored = self._ignored(ignore)
        unplaced = [name for name in names if name not in self.expected and name not in ignored]
        if unplaced:
            raise SourceError(
                f"{where}: {_count(unplaced, 'source tensor')} without a place: {_some(unplaced)}; add them to "
                f"`ignore_tensors` with a reason"
            )
        missing = [name for name in self.expected if name not in names or name in ignored]
        if missing:
            head = [name for name in missing if self.expected[name].rule.pieces == (HEAD,)]
            mend = "complete the checkpoint, or mend config.json if it belongs to another"
            if head == missing:
                mend = "set tie_word_embeddings to true in config.json if the head is the embedding"
            if any(name in ignored for name in missing):
                mend = "take them off `ignore_tensors`"
            raise SourceError(f"{where}: {_count(missing, 'required tensor')} missing: {_some(missing)}; {mend}")
        for name, expected in self.expected.items():
            if tuple(names[name].shape) != expected.shape:
                raise SourceError(
                    f"{where}: {name}: shape {list(expected.shape)} is required by config.json "
                    f"(got {list(names[name].shape)}); config.json must belong to these weights"
                )
        return ignored

    def _ignored(self, ignore: Sequence[IgnoredTensor]) -> dict[str, tuple[str, str]]:
        assert self.headers is not None
        rules = list(self.family.ignored.items())
        if self.arch.tied_head and self.locate(EMBEDDING).name == locate_piece(self.family, EMBEDDING).name:
            rules += [(rule.source, TIED_HEAD_REASON) for rule in self.family.rules if rule.pieces == (HEAD,)]
        for index, item in enumerate(ignore):
            if not any(fnmatchcase(name, item.name) for name in self.headers.tensors):
                raise RecipeError(
                    f"ignore_tensors[{index}].name: must match a source tensor (got '{item.name}')"
                    f"{did_you_mean(item.name, self.headers.tensors)}"
                )
            rules.append((item.name, item.reason))
        found: dict[str, tuple[str, str]] = {}
        for name in self.headers.tensors:
            match = next((rule for rule in rules if fnmatchcase(name, rule[0])), None)
            if match is not None:
                found[name] = match
        return found


def read_source_model(source: str | Path | Source) -> SourceModel:
    """Reads `config.json` and safetensors headers of a source, nothing else.

    Args:
        source: A folder, a hub id, or what `locate` returned. A folder without weights will do.

    Raises:
        SourceError: Nothing there, an unknown family, a broken file, or weights that are not plain floats.
    """
    located = source if isinstance(source, Source) else locate(source)
    config = located.read_config()
    if config.get("model_type") == "refold":
        raise SourceError(
            f"{located.where}: a transformers checkpoint is required (got a folder refold wrote); give the source it "
            f"was made from, or export it first"
        )
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "unknown")
        raise SourceError(
            f"{located.where}/config.json: plain float weights are required (got a model quantised by {method}); "
            f"dequantise it first, or take the original"
        )
    arch, family = read_arch(config), find_family(config.get("model_type"))
    headers = located.headers(config_only=True)
    family = family if headers is None else _as_spelled(family, headers)
    expected = source_tensors(arch, family)
    if headers is not None and arch.tied_head:
        expected = _with_stored_embedding(expected, family, headers)
    dtype = _config_dtype(config) if headers is None else _stored_dtype(located.where, headers, expected)
    return SourceModel(located, arch, family, dtype, headers, expected)


def _as_spelled(family: Family, headers: CheckpointHeaders) -> Family:
    """The family with those of its rules whose names the checkpoint has."""
    for rules in family.spellings:
        spelled = replace(family, rules=rules)
        if any(locate_piece(spelled, piece).name in headers.tensors for piece in (EMBEDDING, HEAD)):
            return spelled
    return family


def _with_stored_embedding(
    expected: dict[str, SourceTensor], family: Family, headers: CheckpointHeaders
) -> dict[str, SourceTensor]:
    # Of a tied pair a checkpoint may hold either; some hold only the head.
    embedding, head = locate_piece(family, EMBEDDING).name, locate_piece(family, HEAD).name
    if embedding in headers.tensors or head not in headers.tensors:
        return expected
    return {
        head: replace(expected[embedding], name=head),
        **{name: tensor for name, tensor in expected.items() if name != embedding},
    }


def _stored_dtype(where: str, headers: CheckpointHeaders, expected: Mapping[str, SourceTensor]) -> str:
    sizes: Counter[str] = Counter()
    for name, info in headers.tensors.items():
        if name in expected:
            if info.dtype not in STORED_DTYPES:
                raise SourceError(
                    f"{where}: {name}: dtype must be one of {', '.join(STORED_DTYPES)} (got {info.dtype}); "
                    f"dequantise it first, or take the original"
                )
            sizes[STORED_DTYPES[info.dtype]] += info.num_elements
    return sizes.most_common(1)[0][0] if sizes else "bfloat16"


def _config_dtype(config: Mapping[str, Any]) -> str:
    given = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if given not in DTYPE_BYTES:
        raise SourceError(f"config.json: dtype: {must_be_one_of(given, DTYPE_BYTES)}")
    return given


def _count(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NUM_NAMED]) + (", ..." if len(names) > NUM_NAMED else "")


class SourceRecord(Frozen):
    """A source, by what it is and where it lay."""

    path: str | None
    """Its folder; None on the hub."""
    id: str | None
    """Its hub id; None in a folder."""
    revision: str | None
    model_type: str
    config_sha256: str | None
    index_sha256: str | None
    """Of the index file or the single file's header; None without weights."""
    dtype: str

    def is_of(self, source: Source) -> bool:
        """Whether it may be this source: its config, and where both have weights their headers, are the same."""
        found = source.fingerprint()
        pairs = ((self.config_sha256, found["config_sha256"]), (self.index_sha256, found["index_sha256"]))
        return all(ours is None or theirs is None or ours == theirs for ours, theirs in pairs)


def record_source(model: SourceModel) -> SourceRecord:
    """Describes a source that has been read."""
    source = model.source
    return SourceRecord(
        path=None if source.path is None else str(source.path.resolve()),
        id=source.hub_id,
        revision=source.revision,
        model_type=model.family.model_type,
        dtype=model.dtype,
        **source.fingerprint(),
    )
