from refold.cli.evaluation_tables import print_evaluation
from refold.evaluation.result import ExitScores, ModelFacts


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
