"""Keys of a GGUF file about the tokenizer: tokens, merges or scores, special tokens, chat template."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refold.checkpoint.source_file import parse_object, read_file
from refold.errors import ExportError
from refold.exporting.gguf.contents import FieldValue
from refold.exporting.gguf.pre_tokenizers import name_pre_tokenizer
from refold.exporting.gguf.sentence_pieces import has_prefix, is_byte_token, score_tokens

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's kinds of tokens."""
SPECIAL = ("bos", "eos", "unk", "pad", "sep", "mask")
NO_END = (
    "the tokenizer names no end token: llama.cpp takes its default id, at which generation stops; name `eos_token` in "
    "tokenizer_config.json"
)


@dataclass(frozen=True)
class Vocabulary:
    """Keys of a tokenizer, and notes."""

    fields: dict[str, FieldValue]
    notes: tuple[str, ...] = ()


@dataclass
class _Tokens:
    """Tokens by id with their kinds, filled up to the rows of the embedding."""

    names: list[str]
    kinds: list[int] = field(default_factory=list)


def read_vocabulary(folder: Path, config: Mapping[str, Any], vocab_size: int) -> Vocabulary:
    """Reads the tokenizer of a model folder.

    Args:
        folder: The folder.
        config: Its `config.json`, for ids that the tokenizer does not name.
        vocab_size: Number of rows of the embedding.

    Raises:
        ExportError: llama.cpp has no equal tokenizer, so it would split texts into other tokens.
        SourceError: A file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        if (folder / "tokenizer.model").exists():
            raise ExportError(
                f"{folder}: tokenizer.json is required (got tokenizer.model alone); load the tokenizer with "
                f"AutoTokenizer and save it"
            )
        note = "the model has no tokenizer: llama.cpp takes and gives token ids only"
        return Vocabulary({"tokenizer.ggml.model": "none"}, (note,))
    raw = parse_object(read_file(path), str(path), "copy the tokenizer again")
    settings = _read_optional(folder / "tokenizer_config.json")
    model = raw.get("model", {})
    if model.get("type") != "BPE":
        raise ExportError(f"{path}: a tokenizer of type BPE is required (got {model.get('type')}); llama.cpp needs it")
    tokens = _list_tokens(raw, vocab_size, str(path))
    merges = [_pair(merge) for merge in model.get("merges", ())]
    if _is_byte_level(raw):
        fields, notes = _byte_level(raw, merges, str(path))
    else:
        fields, notes = _sentence_pieces(raw, merges, tokens, str(path))
    fields |= {"tokenizer.ggml.tokens": tokens.names, "tokenizer.ggml.token_type": tokens.kinds}
    ids = {token: index for index, token in enumerate(tokens.names)}
    special = _special_ids(settings, config, ids)
    fields |= {f"tokenizer.ggml.{_key(name)}_token_id": index for name, index in special.items()}
    fields |= _added_ends(raw, special, str(path))
    notes += _further_ends(folder, special, fields)
    if "eos" not in special:
        notes.append(NO_END)
    template = _chat_template(folder, settings)
    if template:
        fields["tokenizer.chat_template"] = template
    return Vocabulary(fields, tuple(notes))


def _byte_level(
    raw: Mapping[str, Any], merges: list[tuple[str, str]], where: str
) -> tuple[dict[str, FieldValue], list[str]]:
    model, notes = raw["model"], []
    normalizer = raw.get("normalizer")
    if normalizer is not None:
        if normalizer.get("type") != "NFC":
            raise ExportError(
                f"{where}: no normalizer but NFC is required (got {normalizer.get('type')}), because llama.cpp has none"
            )
        notes.append("llama.cpp does not bring texts into the form NFC, as the tokenizer does")
    fields: dict[str, FieldValue] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name_pre_tokenizer(raw.get("pre_tokenizer"), bool(model.get("ignore_merges")), where),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        "tokenizer.ggml.add_space_prefix": False,
    }
    return fields, notes + _odd_tokens(raw)


def _sentence_pieces(
    raw: Mapping[str, Any], merges: list[tuple[str, str]], tokens: _Tokens, where: str
) -> tuple[dict[str, FieldValue], list[str]]:
    ids: dict[str, int] = dict(raw["model"]["vocab"])
    added = {each["content"] for each in raw.get("added_tokens", ())}
    scores = score_tokens(ids, merges, added, where)[: len(tokens.names)]
    fields: dict[str, FieldValue] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores + [0.0] * (len(tokens.names) - len(scores)),
        "tokenizer.ggml.add_space_prefix": has_prefix(raw.get("normalizer"), raw.get("pre_tokenizer"), where),
    }
    return fields, _odd_tokens(raw)


def _list_tokens(raw: Mapping[str, Any], vocab_size: int, where: str) -> _Tokens:
    model = raw["model"]
    by_id = {index: token for token, index in model.get("vocab", {}).items()}
    added = {each["id"]: each for each in raw.get("added_tokens", ())}
    by_id |= {index: each["content"] for index, each in added.items()}
    if by_id and max(by_id) >= vocab_size:
        raise ExportError(
            f"{where}: at most {vocab_size} tokens are required, the rows of the embedding (got token {max(by_id)}); "
            f"use the tokenizer of this model"
        )
    found = _Tokens([])
    for index in range(vocab_size):
        found.names.append(by_id.get(index, f"[PAD{index}]"))
        found.kinds.append(_kind(index, by_id, added, model))
    return found


def _kind(index: int, by_id: Mapping[int, str], added: Mapping[int, Any], model: Mapping[str, Any]) -> int:
    if index not in by_id:
        return UNUSED
    if by_id[index] == model.get("unk_token"):
        return UNKNOWN
    if index in added:
        return CONTROL if added[index].get("special") else USER_DEFINED
    return BYTE if model.get("byte_fallback") and is_byte_token(by_id[index]) else NORMAL


def _special_ids(settings: Mapping[str, Any], config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    """Returns the id by kind of special token: from the tokenizer, or from the config where the tokenizer has none."""
    found = {}
    for name in SPECIAL:
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        index = ids.get(token) if isinstance(token, str) else None
        if index is None and name in ("bos", "eos", "pad"):
            given = config.get(f"{name}_token_id")
            given = given[0] if isinstance(given, list) and given else given
            index = given if isinstance(given, int) and 0 <= given < len(ids) else None
        if index is not None:
            found[name] = index
    return found


def _key(name: str) -> str:
    return {"unk": "unknown", "sep": "seperator", "pad": "padding"}.get(name, name)


def _added_ends(raw: Mapping[str, Any], special: Mapping[str, int], where: str) -> dict[str, FieldValue]:
    """Returns whether tokens are put in front of a text and behind it."""
    before, after = _template(raw.get("post_processor"))
    wanted = {"bos": before, "eos": after}
    for name, got in wanted.items():
        if got and got != [special.get(name)]:
            place = "in front of" if name == "bos" else "behind"
            raise ExportError(
                f"{where}: at most the {name} token may stand {place} a text (got tokens {got}), because llama.cpp "
                f"adds no other; name it `{name}_token` in tokenizer_config.json"
            )
    return {f"tokenizer.ggml.add_{name}_token": bool(got) for name, got in wanted.items()}


def _template(post: Mapping[str, Any] | None) -> tuple[list[int], list[int]]:
    """Returns the ids that a post-processor adds before and behind a text."""
    before: list[int] = []
    after: list[int] = []
    for step in [] if post is None else post.get("processors", [post]):
        if step.get("type") != "TemplateProcessing":
            continue
        is_behind = False
        for piece in step.get("single", ()):
            if "Sequence" in piece:
                is_behind = True
            else:
                named = step.get("special_tokens", {}).get(piece["SpecialToken"]["id"], {})
                (after if is_behind else before).extend(named.get("ids", ()))
    return before, after


def _further_ends(folder: Path, special: Mapping[str, int], fields: dict[str, FieldValue]) -> list[str]:
    """Adds the second end token of `generation_config.json`; llama.cpp knows further ones by their names only."""
    given = _read_optional(folder / "generation_config.json").get("eos_token_id")
    further = [index for index in given if index != special.get("eos")] if isinstance(given, list) else []
    if further:
        fields["tokenizer.ggml.eot_token_id"] = further[0]
    return [f"generation also ends at tokens {further[1:]}, which GGUF has no key for"] if further[1:] else []


def _odd_tokens(raw: Mapping[str, Any]) -> list[str]:
    odd = [
        each["content"]
        for each in raw.get("added_tokens", ())
        if each.get("single_word") or each.get("lstrip") or each.get("rstrip")
    ]
    if not odd:
        return []
    return [f"llama.cpp may keep spaces beside {', '.join(odd[:3])} that the tokenizer removes ({len(odd)} tokens)"]


def _is_byte_level(raw: Mapping[str, Any]) -> bool:
    def has(step: Any) -> bool:
        return isinstance(step, dict) and (
            step.get("type") == "ByteLevel" or any(has(each) for each in step.get("pretokenizers", ()))
        )

    return has(raw.get("pre_tokenizer"))


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
    return left, right


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_file(path).decode("utf-8")
    given = settings.get("chat_template")
    if isinstance(given, list):
        given = next((each.get("template") for each in given if each.get("name") == "default"), None)
    return given if isinstance(given, str) else ""


def _read_optional(path: Path) -> dict[str, Any]:
    return parse_object(read_file(path), str(path), "copy the file again") if path.exists() else {}
