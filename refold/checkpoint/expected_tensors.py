"""The tensors that a source must have by its config, compared with its checkpoint; torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from refold.blueprint.source_tensors import SourcePiece, SourceTensor, locate_piece, source_tensors
from refold.checkpoint.headers import CheckpointHeaders
from refold.checkpoint.locate import Source
from refold.errors import RecipeError, SourceError
from refold.families.arch import ArchSpec, Family
from refold.families.registry import find_family, read_arch
from refold.recipe.recipe import IgnoredTensor
from refold.suggest import did_you_mean

TIED_HEAD_REASON = "the head is the embedding (tie_word_embeddings)"
OWN_HEAD_NOTE = (
    "config.json ties head and embedding, but a different lm_head.weight is stored: both are kept, as transformers does"
)
NUM_NAMED = 5
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
WRAPPERS = {
    "_orig_mod.": "torch.compile leaves it: save the model that was compiled, not the compiled one",
    "module.": "DataParallel leaves it: save the wrapped model's `module`",
}
"""Prefixes that wrapper modules put before every name."""


@dataclass(frozen=True)
class ExpectedTensors:
    """The tensors that an architecture must have in one checkpoint.

    Attributes:
        where: The checkpoint's name in messages.
        arch: Its architecture; untied if the checkpoint stores a separate head.
        family: Its family, with the tensor names of this checkpoint.
        headers: Headers of its tensors; None if there is only `config.json`.
        tensors: The tensors that it must have, by name.
        notes: Decisions that differ from the config.
    """

    where: str
    arch: ArchSpec
    family: Family
    headers: CheckpointHeaders | None
    tensors: Mapping[str, SourceTensor]
    notes: tuple[str, ...] = ()

    def locate(self, canonical: str, layer: int | None = None) -> SourcePiece:
        """Finds a canonical tensor, such as `mixer.q_proj.weight`, in this checkpoint."""
        piece = locate_piece(self.family, canonical, layer)
        if canonical == EMBEDDING and piece.name not in self.tensors:
            return SourcePiece(locate_piece(self.family, HEAD).name, piece.rule, piece.index)
        return piece

    def check(self, ignore: Sequence[IgnoredTensor] = ()) -> dict[str, tuple[str, str]]:
        """Compares the checkpoint's tensors with those that the architecture must have.

        Args:
            ignore: The recipe's `ignore_tensors`.

        Returns:
            The ignored tensors: pattern and reason by name. Empty without headers.

        Raises:
            RecipeError: A pattern of `ignore` matches nothing.
            SourceError: A tensor has no place, is missing, or has the wrong shape.
        """
        if self.headers is None:
            return {}
        names = self.headers.tensors
        self._refuse_wrapped()
        ignored = self._ignored(ignore)
        unplaced = [name for name in names if name not in self.tensors and name not in ignored]
        if unplaced:
            raise SourceError(
                f"{self.where}: {_count(unplaced, 'source tensor')} without a place: {_some(unplaced)}; add them to "
                f"`ignore_tensors` with a reason, or mend config.json if the model has them"
            )
        missing = [name for name in self.tensors if name not in names or name in ignored]
        if missing:
            head = [name for name in missing if self.tensors[name].rule.pieces == (HEAD,)]
            mend = "complete the checkpoint, or mend config.json if it belongs to another"
            if head == missing:
                mend = "set tie_word_embeddings to true in config.json if the head is the embedding"
            if any(name in ignored for name in missing):
                mend = "take them off `ignore_tensors`"
            raise SourceError(f"{self.where}: {_count(missing, 'required tensor')} missing: {_some(missing)}; {mend}")
        for name, expected in self.tensors.items():
            shape = tuple(names[name].shape)
            if shape != expected.shape:
                mend = "config.json must belong to these weights"
                if expected.rule.pieces[0] in (EMBEDDING, HEAD) and shape[1:] == expected.shape[1:]:
                    mend = f"set vocab_size to {shape[0]} in config.json if the embedding was resized"
                raise SourceError(
                    f"{self.where}: {name}: shape {list(expected.shape)} is required by config.json (got "
                    f"{list(shape)}); {mend}"
                )
        return ignored

    def _refuse_wrapped(self) -> None:
        assert self.headers is not None
        for prefix, reason in WRAPPERS.items():
            wrapped = [name for name in self.headers.tensors if name.startswith(prefix)]
            if wrapped and wrapped[0].removeprefix(prefix) in self.tensors:
                raise SourceError(
                    f"{self.where}: tensor names without the prefix `{prefix}` are required (got {_some(wrapped)}; "
                    f"{reason})"
                )

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


def expect_tensors(source: Source, config: Mapping[str, Any]) -> ExpectedTensors:
    """Returns the tensors that a source must have, from its config and headers.

    Args:
        source: The source.
        config: Its raw `config.json`.

    Raises:
        SourceError: The family is unknown, a value is not supported, weights are quantised, or a file is broken.
    """
    _refuse_quantised(source, config)
    arch, family = read_arch(config), find_family(config.get("model_type"))
    headers = source.headers(config_only=True)
    if headers is None:
        return ExpectedTensors(source.where, arch, family, None, source_tensors(arch, family))
    family, notes = _as_spelled(family, headers), ()
    if arch.tied_head and _has_own_head(source, family, headers):
        arch, notes = arch.model_copy(update={"tied_head": False}), (OWN_HEAD_NOTE,)
    expected = source_tensors(arch, family)
    if arch.tied_head:
        expected = _with_stored_embedding(expected, family, headers)
    return ExpectedTensors(source.where, arch, family, headers, expected, notes)


def _refuse_quantised(source: Source, config: Mapping[str, Any]) -> None:
    quantised = config.get("quantization_config")
    if not quantised:
        return
    method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
    raise SourceError(
        f"{source.where}/config.json: plain float weights are required (got a model quantised by {str(method)[:60]}); "
        f"dequantise it first, or take the original"
    )


def _has_own_head(source: Source, family: Family, headers: CheckpointHeaders) -> bool:
    """Tells whether a tied checkpoint stores a head that differs from the embedding; transformers does not tie it."""
    embedding, head = (headers.tensors.get(locate_piece(family, each).name) for each in (EMBEDDING, HEAD))
    return embedding is not None and head is not None and not source.holds_same_data(embedding, head)


def _as_spelled(family: Family, headers: CheckpointHeaders) -> Family:
    """Returns the family with the rules whose tensor names the checkpoint has."""
    for rules in family.spellings:
        spelled = replace(family, rules=rules)
        if any(locate_piece(spelled, piece).name in headers.tensors for piece in (EMBEDDING, HEAD)):
            return spelled
    return family


def _with_stored_embedding(
    expected: dict[str, SourceTensor], family: Family, headers: CheckpointHeaders
) -> dict[str, SourceTensor]:
    # A checkpoint may hold either tensor of a tied pair; some hold only the head.
    embedding, head = locate_piece(family, EMBEDDING).name, locate_piece(family, HEAD).name
    if embedding in headers.tensors or head not in headers.tensors:
        return expected
    return {
        head: replace(expected[embedding], name=head),
        **{name: tensor for name, tensor in expected.items() if name != embedding},
    }


def _count(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NUM_NAMED]) + (", ..." if len(names) > NUM_NAMED else "")
