"""The tables of export targets in `refold plan --for` and `refold export --list`."""

import json

from refold.cli.export_tables import print_held
from refold.exporting.registry import targets_for
from refold.planning.plan import plan
from tests.cli.test_commands import run


def test_several_recipes_have_one_row_each_and_no_reasons(make_source, capsys):
    source = make_source("llama")
    made = {
        "strict": plan(source, {"fold": {"loops": 2}}).blueprint,
        "mixed": plan(source, {"mixers": [{"type": "retention"}]}, allow_larger=True).blueprint,
    }
    print_held(made, targets_for("llama.cpp"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["strict", "gguf"], ["mixed", "gguf"]]
    assert len(lines) == 5
    print_held({"mixed": made["mixed"]}, targets_for("llama.cpp"))
    assert "mixed, gguf needs in the recipe: no mixers" in capsys.readouterr().out


def test_the_json_of_all_recipes_has_the_verdicts_too(make_source, monkeypatch, capsys):
    assert run("plan", make_source("llama"), "--for", "llama.cpp", "--json", monkeypatch=monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recursive-gguf"]["for"]["gguf"]["status"] == "kept"
