"""Tokenizers in GGUF files: llama.cpp cuts texts as the tokenizer does, or the tokenizer is refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refold.conversion.convert import convert
from refold.errors import ExportError
from refold.exporting.export import export
from refold.exporting.gguf.pre_tokenizers import LLAMA3_PATTERN, QWEN2_PATTERN, TEKKEN_PATTERN
from refold.exporting.gguf.vocabulary import read_vocabulary

SHIPPED = Path(__file__).parents[3] / "refold" / "shipped" / "stdlib-5m"
TEXTS = (
    "The sea was calm that night, and the moon lay on it.",
    "Naïve cafés — €5 a cup — are dear: 北京 has cheaper ones. 🙂",
    "def add(a, b):\n    return a + b  # 3.14159 * 1024\n\n\n\tprint('x')\r\n",
    "  two spaces, 12345678 and 1e-9; it's, we'll, HE'S don't\u00a0x",
    "ISBN 978-3-16-148410-0  <|endoftext|> after",
)


def _steps(*patterns: str) -> list[dict[str, Any]]:
    return [{"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False} for each in patterns]


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WORDS = {**BYTES, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZERS: dict[str, tuple[dict[str, Any], bool]] = {
    "gpt-2": (WORDS, False),
    "smollm": ({"type": "Sequence", "pretokenizers": [DIGITS, WORDS]}, False),
    "smaug-bpe": ({"type": "Sequence", "pretokenizers": [*_steps(LLAMA3_PATTERN), BYTES]}, False),
    "llama-bpe": ({"type": "Sequence", "pretokenizers": [*_steps(LLAMA3_PATTERN), BYTES]}, True),
    "qwen2": ({"type": "Sequence", "pretokenizers": [*_steps(QWEN2_PATTERN), BYTES]}, False),
    "tekken": ({"type": "Sequence", "pretokenizers": [*_steps(TEKKEN_PATTERN), BYTES]}, True),
}


@pytest.fixture(scope="module")
def make_tiny(make_source, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a tiny model with the tokenizer of another folder, in which parts of `tokenizer.json` are replaced."""

    def make(tokenizer: Path, model: dict[str, Any] | None = None, **parts: Any) -> Path:
        raw = json.loads((tokenizer / "tokenizer.json").read_text())
        size = max([*raw["model"]["vocab"].values(), *(each["id"] for each in raw["added_tokens"])]) + 1
        folder = tmp_path_factory.mktemp("tiny")
        shutil.copytree(make_source(vocab_size=size, max_position_embeddings=1024), folder, dirs_exist_ok=True)
        shutil.copy(tokenizer / "tokenizer_config.json", folder)
        raw = {**raw, **parts, "model": {**raw["model"], **(model or {})}}
        (folder / "tokenizer.json").write_text(json.dumps(raw))
        return folder

    return make


def _tokenised(folder: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


def _check(folders: list[Path], llama: Any, make_job: Any, tmp_path: Path) -> None:
    files = [export(folder, tmp_path / f"{index}.gguf", "gguf") for index, folder in enumerate(folders)]
    answers = llama([make_job(file, prompts=[], texts=list(TEXTS)) for file in files])
    for folder, answer in zip(folders, answers, strict=True):
        assert answer["texts"] == _tokenised(folder), folder


def test_llama_cpp_cuts_texts_as_byte_level_tokenizers_do(make_tiny, llama, make_job, tmp_path):
    folders = [
        make_tiny(SHIPPED, {"ignore_merges": ignores}, pre_tokenizer=pre) for pre, ignores in PRE_TOKENIZERS.values()
    ]
    _check([SHIPPED, *folders], llama, make_job, tmp_path)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_are_named(name: str, make_tiny):
    pre, ignores = PRE_TOKENIZERS[name]
    folder = make_tiny(SHIPPED, {"ignore_merges": ignores}, pre_tokenizer=pre)
    assert read_vocabulary(folder, {}, 2048).fields["tokenizer.ggml.pre"] == name


def test_control_under_another_name_texts_are_cut_otherwise(make_tiny, llama, make_job, tmp_path, monkeypatch):
    from refold.exporting.gguf import vocabulary

    monkeypatch.setattr(vocabulary, "name_pre_tokenizer", lambda *rest: "smollm")
    with pytest.raises(AssertionError):
        _check([SHIPPED], llama, make_job, tmp_path)


@pytest.mark.parametrize("name", ["books-10m", "stories260K"])
def test_llama_cpp_cuts_texts_as_the_tokenizers_of_real_models_do(name, material, make_tiny, llama, make_job, tmp_path):
    _check([make_tiny(material / "models" / name)], llama, make_job, tmp_path)


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_llama_cpp_cuts_texts_as_the_tokenizers_of_large_models_do(name, make_tiny, llama, make_job, tmp_path):
    folder = os.environ.get("REFOLD_REAL_MODELS")
    if not folder or not (Path(folder) / name).is_dir():
        pytest.skip(f"{name} is required in the folder that REFOLD_REAL_MODELS names")
    _check([make_tiny(Path(folder) / name)], llama, make_job, tmp_path)


def test_llama_cpp_cuts_texts_as_cut_tokenizers_do(material, make_tiny, llama, make_job, tmp_path):
    folders = []
    for index, tokenizer in enumerate((SHIPPED, material / "models" / "stories260K")):
        # The other texts have tokens that are dropped.
        recipe = {"vocabulary": {"multiple": 1}}
        plan = convert(make_tiny(tokenizer), tmp_path / f"cut-{index}", recipe, calibration=[TEXTS[0]])
        assert plan.cost.target.weight_bytes < plan.cost.source.weight_bytes
        folders.append(tmp_path / f"cut-{index}")
    _check(folders, llama, make_job, tmp_path)


def test_merges_that_scores_cannot_express_are_refused(material, make_tiny, tmp_path):
    folder = make_tiny(material / "models" / "TinyStories-656K")
    with pytest.raises(ExportError, match=r"merges that SentencePiece scores can express are required.*are no merge"):
        export(folder, tmp_path / "model.gguf", "gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("parts", "model", "message"),
    [
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*_steps(r"\w+"), BYTES]}}, {}, r"that llama.cpp has"),
        ({}, {"ignore_merges": True}, r"GPT-2's pattern and ignore_merges"),
        ({"normalizer": {"type": "Lowercase"}}, {}, r"no normalizer but NFC is required .got Lowercase."),
        ({}, {"type": "WordPiece"}, r"a tokenizer of type BPE is required .got WordPiece."),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(parts, model, message, make_tiny, tmp_path):
    with pytest.raises(ExportError, match=message):
        export(make_tiny(SHIPPED, model, **parts), tmp_path / "model.gguf", "gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_token_that_is_added_but_not_the_first_token_is_refused(make_tiny):
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"x": {"id": "x", "ids": [7], "tokens": ["x"]}},
    }
    with pytest.raises(ExportError, match=r"at most the bos token may stand in front of a text .got tokens .7.."):
        read_vocabulary(make_tiny(SHIPPED, post_processor=template), {}, 2048)


def test_more_tokens_than_rows_are_refused_and_fewer_are_filled_up():
    with pytest.raises(ExportError, match=r"at most 100 tokens are required.*got token 2047"):
        read_vocabulary(SHIPPED, {}, 100)
    fields = read_vocabulary(SHIPPED, {}, 2050).fields
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(kinds, list)
    assert tokens[2047:] == [tokens[2047], "[PAD2048]", "[PAD2049]"]
    assert kinds[2047:] == [1, 5, 5]
    assert kinds[0] == 3


def test_special_tokens_template_and_second_end_are_written(tmp_path):
    shutil.copy(SHIPPED / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<|endoftext|>"}, "pad_token": "!"}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6, 7]}')
    found = read_vocabulary(tmp_path, {"eos_token_id": [5, 6]}, 2048)
    wanted = {"bos_token_id": 0, "padding_token_id": 1, "eos_token_id": 5, "eot_token_id": 6, "add_bos_token": False}
    assert {key: found.fields.get(f"tokenizer.ggml.{key}") for key in wanted} == wanted
    assert found.fields["tokenizer.chat_template"] == "{{ messages }}"
    assert found.notes == ("generation also ends at tokens [7], which GGUF has no key for",)


def test_without_a_tokenizer_a_file_takes_ids(tmp_path):
    found = read_vocabulary(tmp_path, {}, 96)
    assert found.fields == {"tokenizer.ggml.model": "none"}
    assert "token ids only" in found.notes[0]
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ExportError, match=r"tokenizer.json is required .got tokenizer.model alone."):
        read_vocabulary(tmp_path, {}, 96)
