from refold.cli.evaluation_tables import print_evaluation
from refold.evaluation.result import Comparison, ExitScores, ModelFacts


def test_each_exit_has_a_row(make_evaluation, capsys):
    left = {"perplexity": 12.0, "accuracy": 0.25, "agreement": 0.625, "kl": 0.3125}
    first = ExitScores(depths=2, bits_per_byte=1.9, **left)
    second = ExitScores(depths=4, bits_per_byte=1.75, gate_accuracy=0.875, **left)
    print_evaluation(make_evaluation(exits=(first, second)))
    printed = capsys.readouterr().out
    assert "exit after" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["2", "1.9000", "25.00%", "62.50%", "0.3125", "-"] in lines
    assert ["4", "1.7500", "25.00%", "62.50%", "0.3125", "87.50%"] in lines


def test_a_model_without_exits_has_no_table_of_them(make_evaluation, capsys):
    print_evaluation(make_evaluation())
    assert "exit after" not in capsys.readouterr().out


def test_weights_are_told_with_their_scheme(make_evaluation, capsys):
    facts = {"model_type": "llama", "parameters": 10, "dtype": "float32"}
    model = ModelFacts(name="m", weight_bytes=1_250_000, quantised="int4", **facts)
    print_evaluation(make_evaluation(model=model))
    assert "1.2 MB, linears in int4" in capsys.readouterr().out
    print_evaluation(make_evaluation(model=model.model_copy(update={"quantised": None})))
    assert "linears in" not in capsys.readouterr().out


def test_sentences_are_broken_within_80_columns(make_evaluation, capsys, monkeypatch):
    found = make_evaluation()
    other = Comparison(
        model=found.model, bits_per_byte=1.5, bits_per_byte_error=0.0123, perplexity=3.5, accuracy=0.5,
        difference=0.1234, difference_error=0.0123, agreement=0.75, kl=0.1234, kept_tokens=1234,
    )  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    print_evaluation(found.model_copy(update={"against": other, "is_whole_data": False, "max_tokens": 200_000}))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    printed = " ".join(" ".join(lines).split())
    assert "difference +0.1234 ± 0.0123 bits per byte, same likeliest token 75.00%, KL 0.1234 nats per token" in printed
    assert "the first 200,000 tokens only; windows of" in printed
    assert "over the 1,234 tokens that" in printed
