import json
import math

from refold.healing.log import StepRecord, TrainLog


def _record(step, loss=1.0):
    return StepRecord(step, 10 * step, loss, {"cross_entropy": loss}, 1e-3, 2.0, 100.0)


def test_records_are_lines_of_json(tmp_path):
    with TrainLog(tmp_path / "train.jsonl", 0) as log:
        log.write(_record(1))
        log.write(_record(2, math.nan))
    first, second = map(json.loads, (tmp_path / "train.jsonl").read_text().splitlines())
    assert (first["step"], first["tokens"], first["cross_entropy"]) == (1, 10, 1.0)
    assert second["loss"] is second["cross_entropy"] is None


def test_a_resumed_log_forgets_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "train.jsonl"
    with TrainLog(path, 0) as log:
        for step in (1, 2, 3):
            log.write(_record(step))
    path.write_text(path.read_text() + '{"step": 4, "tok')
    with TrainLog(path, 2) as log:
        log.write(_record(3, 7.0))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 7.0)]
