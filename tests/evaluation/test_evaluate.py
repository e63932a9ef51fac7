import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from refold.blueprint.integers import COMMON_SCHEMES, SCHEMES
from refold.blueprint.quantisation import quantised_bytes
from refold.conversion.convert import ConvertOptions, convert
from refold.data.mixture import MixedSource, Mixture
from refold.data.readers import from_documents
from refold.data.split import split
from refold.errors import DataError, RefoldError, SourceError
from refold.evaluation.evaluate import evaluate
from refold.evaluation.result import Evaluation, read_evaluation
from refold.evaluation.settings import DEFAULT_CONTEXT, EvaluationSettings
from refold.evaluation.text import describe_domain
from refold.modeling import load
from refold.modeling.load import load_model, load_tokenizer
from refold.modeling.quantise import quantise_linears
from refold.planning.build import identity_blueprint
from refold.sources.source_model import read_source_model

LORA = {"type": "lora", "rank": 5}


@pytest.fixture(scope="module")
def source(make_model) -> Path:
    return make_model()


@pytest.fixture(scope="module")
def folded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folded") / "out"
    convert(source, folder, {"fold": {"loops": 2}, "relax": LORA, "exits": {"at": "loops"}})
    return folder


class Naive:
    """Every token scored by itself, from all logits of its window, in float64."""

    def __init__(self, folder: Path, documents, context: int, stride: int, exit_depth: int | None = None):
        model = load_model(folder, dtype=torch.float32, device="cpu").double()
        tokenizer = load_tokenizer(folder)
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.rows: list[list[torch.Tensor]] = []
        self.labels: list[list[int]] = []
        extra = {} if exit_depth is None else {"exit_depth": exit_depth}
        for text in documents:
            ids = start + tokenizer(text, add_special_tokens=False)["input_ids"]
            self.rows.append([])
            window, logits = (0, 0), torch.empty(0)
            self.labels.append(ids[1:])
            for place in range(1, len(ids)):
                # The first window reaches `context`, each later one `stride` further; a window ends at its last token.
                later = max(0, math.ceil((place - context) / stride))
                last = min(context + later * stride, len(ids) - 1)
                begin = max(0, last - context)
                if place == 1 or begin != window[0] or last != window[1]:
                    window = (begin, last)
                    with torch.no_grad():
                        logits = model(torch.tensor([ids[begin:last]]), **extra).logits[0]
                self.rows[-1].append(logits[place - 1 - begin].log_softmax(-1))
        self.nll = np.array(
            [
                sum(-float(row[label]) for row, label in zip(rows, labels, strict=True))
                for rows, labels in zip(self.rows, self.labels, strict=True)
            ]
        )
        self.num_tokens = sum(map(len, self.labels))

    def accuracy(self) -> float:
        pairs = [pair for lists in zip(self.rows, self.labels, strict=True) for pair in zip(*lists, strict=True)]
        return sum(int(row.argmax()) == label for row, label in pairs) / len(pairs)

    def compared_with(self, reference: "Naive") -> tuple[float, float]:
        """Share of tokens with the same likeliest one, and nats of KL(reference || this) per token."""
        rows, references = ([row for rows in naive.rows for row in rows] for naive in (self, reference))
        pairs = list(zip(rows, references, strict=True))
        kl = sum(float((p.exp() * (p - q)).sum()) for q, p in pairs) / len(pairs)
        return sum(bool(q.argmax() == p.argmax()) for q, p in pairs) / len(pairs), kl


def _bytes(texts) -> np.ndarray:
    return np.array([len(text.encode()) for text in texts])


def _jackknife(amounts: np.ndarray, sizes: np.ndarray) -> float:
    count = len(sizes)
    left_out = np.array([np.delete(amounts, i).sum() / np.delete(sizes, i).sum() for i in range(count)])
    return float(np.sqrt((count - 1) / count * np.square(left_out - left_out.mean()).sum()))


@pytest.mark.parametrize(("context", "stride"), [(16, 8), (16, 3), (7, 7), (200, 100)])
def test_every_figure_is_that_of_the_naive_computation(source, folded, sentences, context: int, stride: int):
    found = evaluate(
        folded,
        from_documents(sentences),
        EvaluationSettings(context=context, stride=stride, device="cpu"),
        against=source,
    )
    model, other = (Naive(folder, sentences, context, stride) for folder in (folded, source))
    num_bytes = _bytes(sentences).sum()
    assert (found.context, found.stride, found.documents) == (context, stride, len(sentences))
    assert (found.tokens, found.bytes) == (model.num_tokens, num_bytes)
    assert found.bits_per_byte == pytest.approx(model.nll.sum() / math.log(2) / num_bytes, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(model.nll.sum() / model.num_tokens), rel=1e-4)
    assert found.accuracy == pytest.approx(model.accuracy(), abs=1e-9)
    against = found.against
    assert against is not None
    assert against.bits_per_byte == pytest.approx(other.nll.sum() / math.log(2) / num_bytes, rel=1e-5)
    assert against.perplexity == pytest.approx(math.exp(other.nll.sum() / other.num_tokens), rel=1e-4)
    assert against.accuracy == pytest.approx(other.accuracy(), abs=1e-9)
    difference = (model.nll - other.nll).sum() / math.log(2) / num_bytes
    assert against.difference == pytest.approx(difference, abs=1e-4)
    agreement, kl = model.compared_with(other)
    assert against.kl == pytest.approx(kl, rel=1e-5)
    assert against.agreement == pytest.approx(agreement)


def test_standard_errors_are_near_those_of_leaving_each_document_out(source, folded, sentences):
    texts = [sentence[start : start + 30] for sentence in sentences for start in range(0, len(sentence) - 25, 4)]
    found = evaluate(
        folded, from_documents(texts), EvaluationSettings(context=32, stride=32, device="cpu"), against=source
    )
    model, other = (Naive(folder, texts, 32, 32) for folder in (folded, source))
    sizes = _bytes(texts)
    assert found.bits_per_byte_error == pytest.approx(_jackknife(model.nll / math.log(2), sizes), rel=0.1)
    assert found.against is not None
    paired = _jackknife((model.nll - other.nll) / math.log(2), sizes)
    assert found.against.difference_error == pytest.approx(paired, rel=0.1)
    assert found.against.bits_per_byte_error == pytest.approx(_jackknife(other.nll / math.log(2), sizes), rel=0.1)


def test_exits_are_the_model_left_early(folded, sentences):
    found = evaluate(folded, from_documents(sentences[:2]), EvaluationSettings(context=16, stride=8, device="cpu"))
    assert [each.depths for each in found.exits] == [2]
    early = Naive(folded, sentences[:2], 16, 8, exit_depth=2)
    num_bytes = _bytes(sentences[:2]).sum()
    assert found.exits[0].bits_per_byte == pytest.approx(early.nll.sum() / math.log(2) / num_bytes, rel=1e-5)
    assert found.exits[0].accuracy == pytest.approx(early.accuracy(), abs=1e-9)
    assert found.exits[0].bits_per_byte != found.bits_per_byte
    full = Naive(folded, sentences[:2], 16, 8)
    agreement, kl = early.compared_with(full)
    assert found.exits[0].agreement == pytest.approx(agreement, abs=1e-9)
    assert found.exits[0].kl == pytest.approx(kl, rel=1e-4)
    assert found.exits[0].gate_accuracy is None


def test_exits_are_scored_through_their_own_norm_and_head(source, sentences, tmp_path):
    exits = {"at": [0, 2], "norm": "own", "head_rank": 3, "gate": True}
    convert(source, tmp_path / "out", {"fold": {"loops": 2}, "exits": exits})
    model = load_model(tmp_path / "out", device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for weight in model.model.exits.parameters():
        weight.data.add_(torch.randn(weight.shape, generator=generator))
    model.save_pretrained(tmp_path / "out")
    text = from_documents(sentences[:2])
    found = evaluate(tmp_path / "out", text, EvaluationSettings(context=16, stride=8, device="cpu", dtype="float32"))
    full = Naive(tmp_path / "out", sentences[:2], 16, 8)
    for left, depths in zip(found.exits, (1, 3), strict=True):
        early = Naive(tmp_path / "out", sentences[:2], 16, 8, exit_depth=depths)
        assert left.accuracy == pytest.approx(early.accuracy(), abs=1e-9)
        agreement, kl = early.compared_with(full)
        assert (left.agreement, left.kl) == (pytest.approx(agreement, abs=1e-9), pytest.approx(kl, rel=1e-4))


def test_gates_are_right_where_they_say_what_is_so(source, sentences, tmp_path):
    convert(source, tmp_path / "out", {"fold": {"loops": 2}, "exits": {"at": [0, 2], "gate": True}})
    model: Any = load_model(tmp_path / "out", device="cpu", dtype=torch.float32)
    tokenizer = load_tokenizer(tmp_path / "out")
    parts = [model.model.exits[index] for index in ("0", "2")]
    for place, part in enumerate(parts):
        part.gate.weight.data.normal_(generator=torch.Generator().manual_seed(place))
    right, count = [0, 0], 0
    for text in sentences:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            out = model(ids[:, :-1], output_exits=True)
        for place, (logits, gate) in enumerate(zip(out.exit_logits, out.exit_gates, strict=True)):
            right[place] += int(((logits.argmax(-1) == out.logits.argmax(-1)) == (gate > 0)).sum())
        count += ids.shape[1] - 1
    settings = EvaluationSettings(context=200, stride=100)
    found = evaluate(model, from_documents(sentences), settings, tokenizer=tokenizer)
    assert [left.gate_accuracy for left in found.exits] == pytest.approx([each / count for each in right])
    # One that always says yes is right as often as the exit agrees; one that always says no, the rest of the time.
    for part, bias in zip(parts, (9.0, -9.0), strict=True):
        part.gate.weight.data.zero_()
        part.gate.bias.data.fill_(bias)
    yes, no = evaluate(model, from_documents(sentences), settings, tokenizer=tokenizer).exits
    assert yes.gate_accuracy == pytest.approx(yes.agreement)
    assert no.gate_accuracy == pytest.approx(1 - no.agreement)


def test_a_source_against_itself_differs_in_nothing(source, sentences):
    against = evaluate(source, from_documents(sentences), EvaluationSettings(device="cpu"), against=source).against
    assert against is not None
    assert (against.difference, against.difference_error, against.agreement) == (0, 0, 1)
    assert against.kl == pytest.approx(0, abs=1e-6)


def test_batches_of_any_size_give_the_same(source, sentences):
    alone, together = (
        evaluate(source, from_documents(sentences), EvaluationSettings(context=16, batch_size=size, device="cpu"))
        for size in (1, 64)
    )
    assert alone.bits_per_byte == pytest.approx(together.bits_per_byte, rel=1e-6)
    assert alone.batch_size == 1


def test_bytes_of_a_document_without_a_scored_token_do_not_count(source, sentences, tmp_path):
    folder = shutil.copytree(source, tmp_path / "deaf")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # This tokenizer reads no digits: of a number only the start token remains, and nothing is predicted.
    tokenizer.normalizer = normalizers.Replace(Regex("[0-9]"), "")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = EvaluationSettings(context=16, stride=8, device="cpu")
    found = evaluate(folder, from_documents([*sentences, "1234567890"]), settings)
    alone = evaluate(folder, from_documents(sentences), settings)
    assert (found.documents, found.tokens) == (len(sentences), alone.tokens)
    assert found.bytes == _bytes(sentences).sum()
    assert found.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-6)
    assert found.bits_per_byte_error == pytest.approx(alone.bits_per_byte_error, rel=1e-6)


def test_without_a_start_token_neither_the_first_token_nor_its_bytes_count(make_model, sentences):
    folder = make_model(start=False, bos_token_id=None, eos_token_id=None)
    texts = (*sentences, "x", "🙂 at the front")
    found = evaluate(folder, from_documents(texts), EvaluationSettings(context=16, stride=8, device="cpu"))
    naive = Naive(folder, texts, 16, 8)
    tokenizer = load_tokenizer(folder)
    names = [tokenizer.tokenize(text)[0] for text in texts]
    # Byte-level tokens spell each byte as one character.
    num_bytes = sum(len(text.encode()) - len(name) for text, name in zip(texts, names, strict=True))
    assert (found.bytes, found.tokens, found.documents) == (num_bytes, naive.num_tokens, len(texts) - 1)
    assert found.bits_per_byte == pytest.approx(naive.nll.sum() / math.log(2) / num_bytes, rel=1e-5)


def test_loaded_models_stay_in_their_mode_and_give_the_same_as_folders(source, folded, sentences):
    data = from_documents(sentences)
    models = [load_model(folder, device="cpu").train() for folder in (folded, source)]
    found = evaluate(models[0], data, tokenizer=load_tokenizer(source), against=models[1])
    expected = evaluate(folded, data, EvaluationSettings(device="cpu"), against=source)
    assert all(model.training for model in models)
    assert found.bits_per_byte == expected.bits_per_byte
    assert found.against is not None
    assert expected.against is not None
    assert found.against.kl == expected.against.kl


def test_defaults_are_stated(source, sentences):
    found = evaluate(source, from_documents(sentences), EvaluationSettings(device="cpu"))
    assert (found.context, found.stride) == (256, 128)
    assert found.model.dtype == "float32"
    assert found.is_whole_data
    assert found.machine.torch_threads == torch.get_num_threads()
    assert found.tokens_per_second > 0
    assert DEFAULT_CONTEXT == 1024


def test_long_models_get_the_default_context(make_model, sentences):
    folder = make_model(max_position_embeddings=2048)
    assert evaluate(folder, from_documents(sentences), EvaluationSettings(device="cpu")).context == DEFAULT_CONTEXT


def test_files_are_named_with_size_and_hash(source, sentences, tmp_path: Path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, sentence in zip(paths, sentences, strict=False):
        path.write_text(sentence, encoding="utf-8")
    found = evaluate(source, paths, EvaluationSettings(device="cpu"))
    assert [file.name for file in found.data] == [str(path) for path in paths]
    assert found.data[1].sha256 == hashlib.sha256(paths[1].read_bytes()).hexdigest()
    assert found.data[1].bytes == paths[1].stat().st_size
    memory = evaluate(source, from_documents(sentences[:2], name="two"), EvaluationSettings(device="cpu")).data
    assert (memory[0].name, memory[0].bytes) == ("two", _bytes(sentences[:2]).sum())


def test_max_tokens_ends_the_data_and_says_so(source, sentences):
    found = evaluate(source, from_documents(sentences), EvaluationSettings(max_tokens=20, device="cpu"))
    assert not found.is_whole_data
    assert found.max_tokens == 20
    assert found.tokens < 20


def test_progress_reaches_the_number_of_windows(source, sentences):
    calls: list[tuple[int, int]] = []
    evaluate(
        source,
        from_documents(sentences),
        EvaluationSettings(context=16, batch_size=4, device="cpu"),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1][0] == calls[-1][1] == calls[0][1] > 4
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_bfloat16_weights_are_used_as_asked(source, sentences):
    found = evaluate(source, from_documents(sentences), EvaluationSettings(dtype="bfloat16", device="cpu"))
    full = evaluate(source, from_documents(sentences), EvaluationSettings(device="cpu"))
    assert found.model.dtype == "bfloat16"
    assert found.bits_per_byte != full.bits_per_byte
    assert found.bits_per_byte == pytest.approx(full.bits_per_byte, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 257}, r"context: must be at most 256, the positions of .* \(got 257\)"),
        ({"context": 0}, r"context: at least 1 token is required \(got 0\)"),
        ({"context": 8, "stride": 9}, r"a stride between 1 and the context of 8 tokens is required \(got 9\)"),
        ({"batch_size": 0}, r"batch_size: at least 1 window is required \(got 0\)"),
        ({"max_tokens": 1}, r"data: a document of at least two tokens is required \(got 1 in all\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(source, sentences, options, message: str):
    with pytest.raises(DataError, match=message):
        evaluate(source, from_documents(sentences), EvaluationSettings(device="cpu", **options))


def test_another_vocabulary_is_refused(source, make_source, make_model, sentences, tmp_path: Path):
    data = from_documents(sentences)
    with pytest.raises(SourceError, match=r"against: the vocabulary of .* is required \(got 300 and 96 tokens\)"):
        evaluate(source, data, EvaluationSettings(device="cpu"), against=make_source("llama"))
    other = make_model()
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace('"</s>"', '"<end>"'), encoding="utf-8")
    config = (other / "tokenizer_config.json").read_text(encoding="utf-8")
    (other / "tokenizer_config.json").write_text(config.replace('"</s>"', '"<end>"'), encoding="utf-8")
    with pytest.raises(SourceError, match=r"\(got 2 entries that only one has\); compare models that share a token"):
        evaluate(source, data, EvaluationSettings(device="cpu"), against=other)


def test_a_tokenizer_is_required(source, make_source, sentences):
    data = from_documents(sentences)
    with pytest.raises(SourceError, match=r"a tokenizer is required \(none there\); copy its files into the folder"):
        evaluate(make_source("llama"), data, EvaluationSettings(device="cpu"))
    with pytest.raises(SourceError, match="a tokenizer is required"):
        evaluate(load_model(source, device="cpu"), data)


def test_stored_bytes_are_stated_where_half_precision_is_slow(source, sentences, tmp_path, monkeypatch):
    half = tmp_path / "half"
    load_model(source, device="cpu").bfloat16().save_pretrained(half)
    load_tokenizer(source).save_pretrained(half)
    for is_fast, computed_in in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(load, "_has_half_instructions", lambda dtype, is_fast=is_fast: is_fast)
        facts = evaluate(half, from_documents(sentences), EvaluationSettings(device="cpu")).model
        assert (facts.dtype, facts.computed_in, facts.weight_bytes) == ("bfloat16", computed_in, 2 * facts.parameters)


@pytest.mark.parametrize("option", [{"dtype": "bfloat16"}, {"device": "cpu"}])
def test_a_loaded_model_is_not_moved(source, sentences, option):
    model = load_model(source, device="cpu")
    with pytest.raises(RefoldError, match=r"only a model loaded from a folder can be given one \(got .* for a loaded"):
        evaluate(model, from_documents(sentences), EvaluationSettings(**option), tokenizer=load_tokenizer(source))


@pytest.mark.parametrize("scheme", [*COMMON_SCHEMES, "int3g128", "int2"])
def test_quantised_linears_are_scored_and_their_bytes_counted(source, folded, sentences, scheme: str):
    data = from_documents(sentences)
    for folder in (source, folded):
        whole = evaluate(folder, data, EvaluationSettings(device="cpu"))
        found = evaluate(folder, data, EvaluationSettings(quantise=scheme, device="cpu"), against=folder)
        model: Any = load_model(folder, device="cpu")
        quantise_linears(model, SCHEMES[scheme])
        by_hand = evaluate(model, data, tokenizer=load_tokenizer(folder))
        assert found.bits_per_byte == by_hand.bits_per_byte != whole.bits_per_byte
        assert (found.model.quantised, whole.model.quantised) == (scheme, None)
        arch = read_source_model(source).arch
        blueprint = identity_blueprint(arch) if folder == source else model.config.read_blueprint()
        assert found.model.weight_bytes == quantised_bytes(blueprint, 4, SCHEMES[scheme]) < whole.model.weight_bytes
        assert found.model.parameters == whole.model.parameters
        # The model compared with is not quantised.
        assert found.against is not None
        assert found.against.model == whole.model
        assert found.against.bits_per_byte == whole.bits_per_byte
        assert 0 < found.against.kl < (0.1 if scheme == "int8" else 10)


def test_int8_is_nearer_than_int4(source, sentences):
    data = from_documents(sentences)
    found = [
        evaluate(source, data, EvaluationSettings(quantise=scheme, device="cpu"), against=source).against
        for scheme in COMMON_SCHEMES
    ]
    assert found[0].kl < 0.2 * found[1].kl  # pyright: ignore[reportOptionalMemberAccess]


def test_what_cannot_be_quantised_is_refused(source, sentences):
    data = from_documents(sentences)
    with pytest.raises(RefoldError, match=r"quantise: must be int8, or int2 to int6 .* \(got 'int7'\)"):
        evaluate(source, data, EvaluationSettings(quantise="int7", device="cpu"))
    model = load_model(source, device="cpu")
    with pytest.raises(
        RefoldError, match=r"quantise: a model's folder is required \(got a loaded model, whose weights"
    ):
        evaluate(model, data, EvaluationSettings(quantise="int8"), tokenizer=load_tokenizer(source))


def test_models_on_two_devices_are_refused(source, sentences):
    other: Any = load_model(source, device="cpu")
    other.to("meta")
    with pytest.raises(RefoldError, match=r"against: both models on one device are required \(got cpu and meta\)"):
        evaluate(source, from_documents(sentences), EvaluationSettings(device="cpu"), against=other)


def test_numbers_that_are_not_finite_are_refused(source, sentences):
    model: Any = load_model(source, device="cpu")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(RefoldError, match=r"finite predictions are required \(got nan in float32\); the weights are"):
        evaluate(model, from_documents(sentences), tokenizer=load_tokenizer(source))


def test_all_logits_are_never_held(source, sentences, monkeypatch):
    from refold.scoring import agreement

    largest = 0
    chunks = agreement.chunks

    def small(num_positions: int, vocab_size: int, num_matrices: int, chunk_bytes: int):
        nonlocal largest
        for rows in chunks(num_positions, vocab_size, num_matrices, 4 * vocab_size * num_matrices * 5):
            largest = max(largest, rows.stop - rows.start)
            yield rows

    expected = evaluate(source, from_documents(sentences), EvaluationSettings(device="cpu"))
    monkeypatch.setattr(agreement, "chunks", small)
    monkeypatch.setattr(torch.nn.Linear, "forward", _no_head(torch.nn.Linear.forward))
    assert evaluate(source, from_documents(sentences), EvaluationSettings(device="cpu")).bits_per_byte == pytest.approx(
        expected.bits_per_byte, rel=1e-6
    )
    assert largest == 5


def _no_head(forward: Callable) -> Callable:
    def checked(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        assert self.out_features != 300, "the model computed logits of its own"
        return forward(self, x)

    return checked


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K"])
def test_a_real_model_and_its_identity_fold_score_alike(name: str, material: Path, tmp_path: Path):
    source = material / "models" / name
    text = (material / "data" / "tinystories" / "sample.txt").read_text(encoding="utf-8")[:6000]
    convert(source, tmp_path / "folded")
    found: Evaluation = evaluate(
        tmp_path / "folded", from_documents([text]), EvaluationSettings(context=256, device="cpu"), against=source
    )
    assert found.against is not None
    assert abs(found.against.difference) < 1e-4
    assert found.against.agreement > 0.999
    assert 0.5 < found.bits_per_byte < 2
    stock = AutoModelForCausalLM.from_pretrained(source)
    ids = AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False)["input_ids"]
    assert found.tokens == len(ids)
    assert stock.config.vocab_size > max(ids)


def test_several_kinds_are_each_reported_and_the_whole_is_over_all(source: Path, folded: Path, sentences):
    first, second = list(sentences[:4]), ["Numbers 1 2 3 4 5 and 6.", "More of them: 7 8 9."]
    settings = EvaluationSettings(context=16, stride=8, device="cpu")
    kinds = [from_documents(first, name="prose"), from_documents(second, name="numbers")]
    whole = evaluate(folded, kinds, settings, against=source)
    assert [kind.name for kind in whole.kinds] == ["prose", "numbers"]
    for kind, texts in zip(whole.kinds, (first, second), strict=True):
        alone = evaluate(folded, texts, settings, against=source)
        assert alone.kinds == ()
        assert alone.against is not None
        assert (kind.documents, kind.tokens, kind.bytes) == (alone.documents, alone.tokens, alone.bytes)
        assert kind.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-5)
        assert kind.bits_per_byte_error == pytest.approx(alone.bits_per_byte_error, rel=1e-4)
        assert kind.difference == pytest.approx(alone.against.difference, abs=1e-6)
        assert kind.kl == pytest.approx(alone.against.kl, rel=1e-4)
        assert (kind.accuracy, kind.agreement) == pytest.approx((alone.accuracy, alone.against.agreement))
    together = evaluate(folded, [*first, *second], settings, against=source)
    assert whole.bits_per_byte == pytest.approx(together.bits_per_byte, rel=1e-5)
    assert (whole.documents, whole.bytes) == (together.documents, together.bytes)
    assert sum(kind.tokens for kind in whole.kinds) == whole.tokens


def test_a_bound_on_tokens_is_shared_out_among_kinds(source: Path, sentences):
    texts = [from_documents([sentence * 5], name=name) for sentence, name in zip(sentences, "abc", strict=False)]
    short = from_documents(["Short."], name="short")
    found = evaluate(source, [short, *texts], EvaluationSettings(max_tokens=200, context=16, device="cpu"))
    # Start tokens count: a short kind leaves its rest to the others.
    assert found.kinds[0].tokens < 20
    assert [kind.tokens for kind in found.kinds[1:]] == pytest.approx([(200 - found.kinds[0].tokens) / 3] * 3, abs=3)
    assert not found.is_whole_data


def test_weights_are_refused_where_nothing_is_mixed(source: Path, sentences):
    mixture = Mixture([(list(sentences), 1), (["Another kind of text here."], 2)])
    with pytest.raises(DataError, match=r"files without weights are required for an evaluation.*drop `=WEIGHT`"):
        evaluate(source, mixture, EvaluationSettings(device="cpu"))


def test_a_model_evaluated_on_its_calibration_text_alone_has_a_line(source: Path, sentences, tmp_path: Path):
    for name in ("books", "docs", "other"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join([*sentences, name] * 6))
    texts = {name: f"{tmp_path / name}.txt?name={name}" for name in ("books", "docs", "other")}
    recipe = {"factor": {"parameters": 0.7}, "calibration": {"tokens": 128, "context": 16}}
    data = [f"{texts['books']}=3", f"{texts['docs']}=1"]
    convert(source, tmp_path / "low", recipe, options=ConvertOptions(allow_larger=True), calibration=data)
    settings = EvaluationSettings(max_tokens=60, context=16, device="cpu")

    def notes(model: Path, *names: str) -> tuple[str, ...]:
        found = evaluate(model, [texts[name] for name in names], settings)
        assert [kind.name for kind in found.kinds] == ([*names] if len(names) > 1 else [])
        assert found.model.fitted_to == (() if model == source else ("books", "docs"))
        return found.notes

    for names in (("books", "docs"), ("books",), ("other",)):
        (line,) = notes(tmp_path / "low", *names)
        told = f"the model was fitted to books and docs and is evaluated on {' and '.join(names)} alone"
        assert line.startswith(told)
        assert "give text of another kind as a second --data" in line
        assert "\n" not in line
    assert notes(tmp_path / "low", "books", "other") == ()
    assert notes(source, "books") == ()
    stage = json.loads((tmp_path / "low" / "provenance.json").read_text())["stages"][0]
    assert stage["text"] == {"books": 0.75, "docs": 0.25}


def test_the_sides_of_a_split_are_of_one_kind(sentences):
    texts = [f"{number} {sentence}" for number in range(8) for sentence in sentences]
    train, held_out = split(from_documents(texts, name="books"), every=3)
    assert train.name != held_out.name
    assert len(describe_domain([train.name], held_out)) == 1
    both = MixedSource.of_whole(held_out, [held_out, from_documents(["Other text."], name="other")])
    assert describe_domain([train.name], both) == ()


def test_results_of_older_versions_are_read(source: Path, sentences, tmp_path: Path):
    found = evaluate(source, from_documents(sentences[:2]), EvaluationSettings(device="cpu", context=16))
    older = json.loads(found.model_dump_json())
    del older["notes"], older["model"]["fitted_to"]
    (tmp_path / "older.json").write_text(json.dumps(older))
    assert read_evaluation(tmp_path / "older.json") == found


def test_an_evaluation_of_kinds_is_read_back(source: Path, sentences, tmp_path: Path):
    found = evaluate(
        source,
        [from_documents(sentences), from_documents(["Other text there."], name="b")],
        EvaluationSettings(device="cpu"),
    )
    assert read_evaluation(found.write(tmp_path)) == found
