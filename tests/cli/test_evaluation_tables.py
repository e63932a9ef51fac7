import pytest

from refold.cli.evaluation_tables import print_evaluation
from refold.evaluation.result import Evaluation, ExitScores, Machine, ModelFacts, Seconds


@pytest.fixture
def evaluation() -> Evaluation:
    left = {"perplexity": 12.0, "accuracy": 0.25, "agreement": 0.625, "kl": 0.3125}
    return Evaluation(
        model=ModelFacts(name="m", model_type="refold", parameters=10, weight_bytes=40, dtype="float32"),
        data=(),
        is_whole_data=True,
        max_tokens=None,
        context=16,
        stride=8,
        batch_size=2,
        documents=1,
        tokens=20,
        bytes=70,
        bits_per_byte=1.5,
        bits_per_byte_error=None,
        perplexity=9.0,
        accuracy=0.5,
        exits=(
            ExitScores(depths=2, bits_per_byte=1.9, **left),
            ExitScores(depths=4, bits_per_byte=1.75, gate_accuracy=0.875, **left),
        ),
        seconds=Seconds(load=1, tokenise=1, model=1, against=1, score=1),
        tokens_per_second=5,
        machine=Machine(device="cpu", device_name="x86_64", cpus=2, torch_threads=1, system="Linux"),
        versions={},
        time="now",
    )


def test_each_exit_has_a_row(evaluation, capsys):
    print_evaluation(evaluation)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["2", "1.9000", "25.00%", "62.50%", "0.3125", "-"] in lines
    assert ["4", "1.7500", "25.00%", "62.50%", "0.3125", "87.50%"] in lines


def test_a_model_without_exits_has_no_table_of_them(evaluation, capsys):
    print_evaluation(evaluation.model_copy(update={"exits": ()}))
    assert "left after" not in capsys.readouterr().out
