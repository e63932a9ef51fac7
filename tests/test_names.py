"""Names and sizes of files: one noun per file, one meaning per name, at most 400 lines."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1] / "refold"
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")
LONGEST = 400
"""Lines of a file."""
MOST_FILES = 680
"""Beside `__init__.py` files."""
VAGUE = {"utils", "helpers", "common", "misc"}
ENDINGS = ("s", "es", "ing", "er", "ed", "_data", "_tensors")
PUBLIC_ALIAS = (ast.Subscript, ast.BinOp)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_no_file_is_too_long_to_read() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: size for name, size in sizes.items() if size > LONGEST} == {}
    assert len(FILES) <= MOST_FILES


def test_no_file_has_a_vague_name() -> None:
    assert [path for path in FILES if path.stem in VAGUE] == []


def test_no_two_files_of_a_package_differ_by_an_ending() -> None:
    by_folder = defaultdict(set)
    for path in FILES:
        by_folder[path.parent].add(path.stem)
    pairs = [
        (folder.name, name, name + ending)
        for folder, names in by_folder.items()
        for name in names
        for ending in ENDINGS
        if name + ending in names
    ]
    assert pairs == []


def test_no_public_class_or_alias_is_defined_twice() -> None:
    places = defaultdict(list)
    for path in FILES:
        for node in parsed(path).body:
            name = ""
            if isinstance(node, ast.ClassDef):
                name = node.name
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                target = node.targets[0].id
                # A type alias is written like a class: a capital letter, then small ones.
                is_type = target[0].isupper() and not target.isupper() and isinstance(node.value, PUBLIC_ALIAS)
                name = target if is_type else ""
            if name and not name.startswith("_"):
                places[name].append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


MOST_PARAMETERS = 7
"""Parameters of a function, self and cls not counted."""
WIDE = {
    # TODO(settings objects of data and healing): their options are keyword arguments.
    "data/training_data.py": {"__init__", "open_training_data"},
    "healing/prepared.py": {"prepare"},
    # Signatures of transformers: a model's forward, an attention function, a mask function.
    "modeling/masks.py": {"build_masks"},
    "modeling/model.py": {"forward"},
    "modeling/stack.py": {"forward"},
    "nn/mixers/attention.py": {"eager_attention"},
    # Operands of one equation.
    "ops/delta_rule.py": {"chunked"},
    "ops/kernels.py": {"delta_rule", "_run"},
    "ops/selective_scan.py": {"chunked", "forward"},
}
"""Functions with more parameters, by file."""


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    named = [each.arg for each in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    spread = [each for each in (function.args.vararg, function.args.kwarg) if each is not None]
    return len(named[1:] if named[:1] in (["self"], ["cls"]) else named) + len(spread)


def test_no_function_has_more_parameters_than_a_reader_holds() -> None:
    found = defaultdict(set)
    for path in FILES:
        name = str(path.relative_to(ROOT))
        for node in ast.walk(parsed(path)):
            # A parameter of a command is an option of the command line, which has its own list in tests/cli/flags.txt.
            is_command = path.parent.name == "cli" and getattr(node, "name", "") == "command"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_command:
                found[name] |= {node.name} if num_parameters(node) > MOST_PARAMETERS else set()
    assert {name: functions for name, functions in found.items() if functions} == WIDE
