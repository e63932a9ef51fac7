"""Tokenizer files of transformers, made of a GGUF file's metadata; torch-free."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from refold.checkpoint.gguf.container import MetadataValue
from refold.checkpoint.gguf.split_patterns import SPLITS
from refold.errors import SourceError
from refold.suggest import must_be_one_of, shorten

KINDS = ("gpt2", "llama")
"""`tokenizer.ggml.model`: a byte-level vocabulary with merges, or one of SentencePiece with scores."""
_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "\u2581"
_TEMPLATE = re.compile(r"tokenizer\.chat_template\.([A-Za-z0-9_-]{1,64})")
_ENDS = ("eos", "eot", "eom")
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def make_tokenizer_files(
    where: str, metadata: Mapping[str, MetadataValue], config: Mapping[str, Any]
) -> dict[str, str]:
    """Makes tokenizer, chat templates and generation config.

    Args:
        where: The file, for messages.
        metadata: Its metadata.
        config: The model's config.

    Returns:
        The files' contents by name; without a tokenizer only the generation config.

    Raises:
        SourceError: The vocabulary is damaged, or of a kind that transformers' tokenizers cannot express.
    """
    vocabulary = _Vocabulary(where, metadata)
    ends = dict.fromkeys(each for role in _ENDS if (each := vocabulary.special_id(role)) is not None)
    ids = {name: config[name] for name in ("bos_token_id", "pad_token_id")}
    generation = {**ids, "eos_token_id": next(iter(ends), None) if len(ends) < 2 else list(ends)}
    files = {"generation_config.json": _dumps({name: value for name, value in generation.items() if value is not None})}
    if vocabulary.kind in (None, "none", "no_vocab"):
        return files
    files["tokenizer.json"] = json.dumps(vocabulary.describe(), ensure_ascii=False)
    files["tokenizer_config.json"] = _dumps(vocabulary.settings(config["max_position_embeddings"]))
    for key, value in metadata.items():
        named = _TEMPLATE.fullmatch(key)
        if isinstance(value, str) and key == "tokenizer.chat_template":
            files["chat_template.jinja"] = value
        elif isinstance(value, str) and named is not None:
            files[f"additional_chat_templates/{named[1]}.jinja"] = value
    return files


class _Vocabulary:
    """The vocabulary in a file's metadata."""

    def __init__(self, where: str, metadata: Mapping[str, MetadataValue]):
        self._where, self._metadata = where, metadata
        self.kind = metadata.get(f"{_PREFIX}model")

    def describe(self) -> dict[str, Any]:
        """Returns the content of `tokenizer.json`."""
        if self.kind not in KINDS:
            raise self._fault("model", must_be_one_of(self.kind, KINDS), "take the transformers folder of the model")
        tokens, types = self._tokens()
        parts = self._byte_level(tokens) if self.kind == "gpt2" else self._sentence_piece(tokens, types)
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                _added(number, token, kind == _CONTROL)
                for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
                if kind in (_CONTROL, _USER_DEFINED) or (kind == _UNKNOWN and self.kind == "llama")
            ],
            **parts,
            "post_processor": self._post_processor(tokens),
        }

    def settings(self, max_positions: int) -> dict[str, Any]:
        """Returns the content of `tokenizer_config.json`."""
        tokens, _ = self._tokens()
        roles = {role: self.special_id(name) for role, name in _ROLES.items()}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_positions,
            "add_bos_token": self._adds("bos"),
            "add_eos_token": self._adds("eos"),
            **{role: tokens[number] for role, number in roles.items() if number is not None},
        }

    def special_id(self, name: str) -> int | None:
        """Returns the id of a special token; None if the file has none."""
        value = self._metadata.get(f"{_PREFIX}{name}_token_id")
        if value is None or value == 2**32 - 1:
            return None
        count = len(self._tokens()[0]) if self.kind in KINDS else 2**32
        if type(value) is not int or not 0 <= value < count:
            raise self._fault(f"{name}_token_id", f"an id below {count:,} is required (got {shorten(value)})")
        return value

    def _byte_level(self, tokens: Sequence[str]) -> dict[str, Any]:
        pre = self._metadata.get(f"{_PREFIX}pre", "default")
        if not isinstance(pre, str) or pre not in SPLITS:
            raise self._fault("pre", must_be_one_of(pre, SPLITS), "take the transformers folder of the model")
        merges = self._texts("merges", least=0)
        pairs = [merge.split(" ") for merge in merges]
        wrong = next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None)
        if wrong is not None:
            raise self._fault("merges", f"two parts with a space between are required (got {shorten(wrong)})")
        return {
            "normalizer": None,
            "pre_tokenizer": SPLITS[pre].describe(),
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": _bpe(tokens, pairs, ignore_merges=SPLITS[pre].whole_words),
        }

    def _sentence_piece(self, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
        scores = self._metadata.get(f"{_PREFIX}scores")
        if not isinstance(scores, tuple) or len(scores) != len(tokens):
            raise self._fault("scores", f"a score of each of the {len(tokens):,} tokens is required")
        unknown = self.special_id("unknown")
        begins = self._metadata.get(f"{_PREFIX}add_space_prefix", True) is not False
        prepend = [{"type": "Prepend", "prepend": _SPACE}] if begins else []
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if begins else []
        mergeable = {
            token: (float(score), number)
            for number, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True))
            if kind in (_NORMAL, _USER_DEFINED) and isinstance(score, int | float)
        }
        return {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [*prepend, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}],
            },
            "pre_tokenizer": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    *strip,
                ],
            },
            "model": _bpe(
                tokens,
                find_merges(mergeable),
                unk_token=None if unknown is None else tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            ),
        }

    def _post_processor(self, tokens: Sequence[str]) -> dict[str, Any]:
        added = {role: tokens[number] for role in ("bos", "eos") if (number := self._added_id(role)) is not None}
        single = [{"Sequence": {"id": "A", "type_id": 0}}]
        pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
        if "bos" in added:
            begin = [{"SpecialToken": {"id": added["bos"], "type_id": number}} for number in (0, 1)]
            single, pair = [begin[0], *single], [begin[0], pair[0], begin[1], pair[1]]
        if "eos" in added:
            end = {"SpecialToken": {"id": added["eos"], "type_id": 0}}
            single, pair = [*single, end], [*pair, {"SpecialToken": {"id": added["eos"], "type_id": 1}}]
        special = {
            token: {"id": token, "ids": [self._added_id(role)], "tokens": [token]} for role, token in added.items()
        }
        return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}

    def _added_id(self, role: str) -> int | None:
        return self.special_id(role) if self._adds(role) else None

    def _adds(self, role: str) -> bool:
        """Tells whether a text gets the token of its beginning or end."""
        given = self._metadata.get(f"{_PREFIX}add_{role}_token")
        if given is not None:
            return given is True
        if role == "eos":
            return False
        pre = self._metadata.get(f"{_PREFIX}pre", "default")
        return self.kind == "llama" or (isinstance(pre, str) and pre in SPLITS and SPLITS[pre].begins)

    def _tokens(self) -> tuple[Sequence[str], Sequence[int]]:
        tokens = self._texts("tokens", least=1)
        types: Any = self._metadata.get(f"{_PREFIX}token_type", (_NORMAL,) * len(tokens))
        if not isinstance(types, tuple) or len(types) != len(tokens) or not all(type(each) is int for each in types):
            raise self._fault("token_type", f"a type of each of the {len(tokens):,} tokens is required")
        return tokens, types

    def _texts(self, key: str, least: int) -> Sequence[str]:
        value: Any = self._metadata.get(_PREFIX + key)
        if not isinstance(value, tuple) or len(value) < least or not all(isinstance(each, str) for each in value):
            raise self._fault(key, f"a list of texts is required (got {shorten(value)})")
        return value

    def _fault(self, key: str, reason: str, mend: str = "convert the model again") -> SourceError:
        return SourceError(f"{self._where}: metadata {_PREFIX}{key}: {reason}; {mend}")


def find_merges(mergeable: Mapping[str, tuple[float, int]]) -> list[tuple[str, str]]:
    """Returns the merges of a vocabulary of SentencePiece, best first.

    SentencePiece joins the two neighbours whose joined piece has the highest score. So each way to cut a token into two
    tokens is a merge, with the token's score.

    Args:
        mergeable: Score and number of each token that may be joined, by its text.
    """
    found = []
    for token, (score, number) in mergeable.items():
        cuts = ((token[:place], token[place:]) for place in range(1, len(token)))
        known = [
            (mergeable[left][1], mergeable[right][1], left, right)
            for left, right in cuts
            if {left, right} <= mergeable.keys()
        ]
        found += [(-score, number, *cut) for cut in sorted(known)]
    found.sort(key=lambda each: each[:2])
    return [(left, right) for *_, left, right in found]


def _bpe(tokens: Sequence[str], merges: Sequence[Sequence[str]], **options: Any) -> dict[str, Any]:
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    # Of equal texts the first token counts, as in llama.cpp.
    vocabulary = {token: number for number, token in reversed(list(enumerate(tokens)))}
    return {"type": "BPE", **plain, **flags, **options, "vocab": vocabulary, "merges": [list(pair) for pair in merges]}


def _added(number: int, token: str, is_special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": token, **flags, "special": is_special}


def _dumps(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
