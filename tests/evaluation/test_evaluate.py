import hashlib
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

from refold.conversion.convert import convert
from refold.data.readers import from_documents
from refold.evaluation.evaluate import evaluate
from refold.evaluation.result import Evaluation
from refold.evaluation.settings import DEFAULT_CONTEXT, EvaluationSettings
from refold.modeling import load
from refold.modeling.load import load_model, load_tokenizer


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


def test_stored_bytes_are_stated_where_half_precision_is_slow(source, sentences, tmp_path, monkeypatch):
    half = tmp_path / "half"
    load_model(source, device="cpu").bfloat16().save_pretrained(half)
    load_tokenizer(source).save_pretrained(half)
    for is_fast, computed_in in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(load, "_has_half_instructions", lambda dtype, is_fast=is_fast: is_fast)
        facts = evaluate(half, from_documents(sentences), EvaluationSettings(device="cpu")).model
        assert (facts.dtype, facts.computed_in, facts.weight_bytes) == ("bfloat16", computed_in, 2 * facts.parameters)


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
