"""The table of the stack in `refold inspect`."""

from refold.cli.inspect_tables import print_inspection
from refold.conversion.convert import convert
from refold.conversion.inspect import inspect


def test_the_stack_says_whose_keys_each_depth_looks_at(make_source, tmp_path, capsys):
    share = [{"depth": 2, "from": 0}, {"depth": 3, "from": 1, "heads": [0]}]
    convert(make_source(), tmp_path / "out", {"share_kv": share, "drop": {"mlp": {"layers": [0]}}})
    print_inspection(inspect(tmp_path / "out"))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1] in "0123" and line]
    assert [" ".join(row[7:-1]) for row in rows] == ["own", "own", "0", "own, 1 (heads 0)"]


def test_the_stack_says_which_depths_have_a_gain(make_source, tmp_path, capsys):
    recipe = {"fold": {"loops": 2, "prelude": 2}, "relax": {"rank": {"q_proj": 3}, "gain": "own"}}
    convert(make_source(), tmp_path / "out", recipe)
    print_inspection(inspect(tmp_path / "out"))
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines() if line[:1] in "0123" and line]
    assert [[cell.strip() for cell in row if cell.strip()][4] for row in rows] == ["-", "-", "3, gain", "3, gain"]


def test_the_stack_says_at_which_ranks_bases_are_shared(make_source, tmp_path, capsys):
    factor = {"parameters": 0.6, "weight": "none", "share": "basis"}
    fold = {"loops": 2, "prelude": 2}
    made = convert(make_source(), tmp_path / "out", {"fold": fold, "relax": {"rank": {"q_proj": 3}}, "factor": factor})
    print_inspection(inspect(tmp_path / "out"))
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines() if line[:1] in "0123" and line]
    bases = {**made.blueprint.mixers[2].bases, **made.blueprint.mlps[2].bases}.values()
    told = [[cell.strip() for cell in row if cell.strip()][4] for row in rows]
    assert told == ["-", "-", *[f"3, basis {min(bases)}..{max(bases)}"] * 2]


def test_narrower_parts_show_their_sizes(make_source, tmp_path, capsys):
    recipe = {"width": {"mlp": [48, 32, 48, 48], "heads": [2, 1, 2, 2], "weight": "none"}}
    convert(make_source("llama"), tmp_path / "out", recipe)
    print_inspection(inspect(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "1 (1 heads)" in printed
    assert "1 (32 neurons)" in printed
    assert "0 (" not in printed
