from refold.healing import log as module
from refold.healing.log import Display, StepRecord


def _record(tokens):
    return StepRecord(1, tokens, 2.5, {}, 1e-3, 1.0, 10.0)


def test_without_a_terminal_there_is_a_line_now_and_then(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with Display(1000) as display:
        for tokens in (100, 200, 300):
            clock[0] += 6.0
            display.show(_record(tokens))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "heal: 200 of 1,000 tokens  loss 2.500  17 tokens/s  48 s left\n"


def test_speed_counts_from_where_a_run_was_resumed(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with Display(1000) as display:
        display.start_at(500)
        clock[0] = 10.0
        display.show(_record(600))
    assert "10 tokens/s  40 s left" in capsys.readouterr().err


def test_quiet_shows_only_what_it_is_told(capsys):
    with Display(1000, quiet=True) as display:
        display.show(_record(100))
        display.tell("resumed")
    assert capsys.readouterr().err == "heal: resumed\n"


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Display(1000) as display:
        display.show(_record(100))
        display.tell("resumed")
    assert "loss 2.500" in capsys.readouterr().err
