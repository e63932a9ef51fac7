"""Names and sizes of files: one noun a file, one meaning a name, nothing too long to read."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1] / "refold"
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")
LONGEST = 400
"""Lines of a file."""
MOST_FILES = 290
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
