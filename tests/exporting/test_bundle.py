"""The generated file: what it has, what it leaves out, and how names are found and renamed."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from refold.errors import RecipeError
from refold.exporting.hub.bundle import bundle
from refold.exporting.hub.global_names import Import
from refold.exporting.hub.left_out import MODULES, NAMES
from refold.exporting.hub.module_code import ModuleCode
from refold.exporting.hub.stand_ins import PlainData
from refold.mixers.registry import MIXERS
from refold.version import __version__

ALL = frozenset(MIXERS)


@pytest.fixture(scope="module")
def text() -> str:
    return bundle(ALL)


def test_the_same_refold_gives_the_same_text(text: str):
    assert bundle.__wrapped__(ALL) == text


def test_licence_version_and_docstrings_are_there(text: str):
    assert "Apache License, Version 2.0" in text[:200]
    assert f"of refold {__version__}: do not edit" in text
    functions = [node for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    public = [node for node in functions if not node.name.startswith("_")]
    # Classes made of members of other classes, such as `Attention`, are described too.
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_nothing_but_torch_and_transformers_is_imported(text: str):
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").partition(".")[0])
    assert modules - set(sys.stdlib_module_names) == {"torch", "transformers"}


def _lint(text: str, place: Path) -> "subprocess.CompletedProcess[str]":
    """Looks for names without a definition, or without a use; letters in shapes are no names."""
    (place / "file.py").write_text(re.sub(r"\b(Float|Int|Bool)\[Tensor, \"[^\"]*\"\]", "Tensor", text))
    rules = ["--select", "F401,F811,F821,F822,E9"]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", *rules, "file.py"]
    return subprocess.run(command, cwd=place, capture_output=True, text=True)


def test_every_name_is_defined_once(text: str, tmp_path: Path):
    names = Counter(node.name for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
    assert [name for name, count in names.items() if count > 1] == []
    done = _lint(text, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_name_without_a_definition_would_be_seen(text: str, tmp_path: Path):
    assert "Undefined name `Fill`" in _lint(text.replace("class Fill:", "class Filling:"), tmp_path).stdout


def test_parts_that_are_left_out_are_really_absent(text: str):
    for module in MODULES:
        for name, unit in ModuleCode(module).definitions.items():
            if isinstance(unit.node, ast.ClassDef) and not name.startswith("_"):
                assert f"class {name}" not in text, name
    assert all(f"class {name}" not in text for _, name in NAMES)
    for word in (r"\bBaseModel\b", r"\bAnnotated\[", "register_model", "def flops", "def carried"):
        assert re.search(word, text) is None, word


@pytest.mark.parametrize("kind", ["attention", "mamba", "linear_attention"])
def test_a_file_has_the_mixers_of_its_model_alone(kind: str):
    names = {name: found.__name__ for name, found in MIXERS.items() if name not in ("attention", kind)}
    text = bundle(frozenset({kind}))
    ast.parse(text)
    assert f'"{kind}": {MIXERS[kind].__name__}Mixer' in text
    assert [name for name in names.values() if f"class {name}(" in text] == []


def _uses(source: str) -> list[str]:
    module = ModuleCode("refold.example", source.encode())
    return [use.name for unit in module.units for use in module.uses(unit.node)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(a):\n    return a + b", ["b"]),
        ("def f():\n    b = 1\n    return b", []),
        ("def f():\n    return [b for b in c]", ["c"]),
        ("def f():\n    found = [b for b in c]\n    return b", ["c", "b"]),
        ("def f():\n    return (b := c)", ["c"]),
        ("def f():\n    def g():\n        return b\n    b = 1\n    return g", []),
        ("class A:\n    b = 1\n    def f(self):\n        return b", ["b"]),
        ("class A:\n    b = 1\n    c = b", []),
        ("def f(b=b):\n    return lambda c: b + c + d", ["b", "d"]),
        ("def f(x: 'A | B') -> \"C\":\n    pass", ["A", "B", "C"]),
        ("def f(x: Float[Tensor, 'B T D']):\n    pass", ["Float", "Tensor"]),
        ("X = Annotated[Y, Z(check)]", ["X", "Y"]),
        ("def f():\n    try:\n        pass\n    except A as b:\n        return b", ["A"]),
        ("def f():\n    for b in c:\n        pass\n    return b", ["c"]),
    ],
)
def test_global_names_are_told_from_local_ones(source: str, expected: list[str]):
    assert _uses(source) == expected


def test_comments_above_and_texts_below_belong_to_a_statement():
    source = '"""Module."""\n\nA = 1\n\n# Why.\nB = 2\n"""What."""\n\n\n# Of f.\n@g\ndef f(): ...\n'
    module = ModuleCode("refold.example", source.encode())
    texts = [module.source[unit.start : unit.stop].decode() for unit in module.units]
    assert texts == ["A = 1\n", '# Why.\nB = 2\n"""What."""\n', "# Of f.\n@g\ndef f(): ...\n"]


def test_imports_of_refold_count_wherever_they_stand():
    source = "from refold.errors import RefoldError\nimport torch\ndef f():\n    from refold.ops import window\n"
    imports = ModuleCode("refold.example", source.encode()).imports
    assert imports == {
        "RefoldError": Import("refold.errors", "RefoldError"),
        "torch": Import("torch"),
        "window": Import("refold.ops", "window"),
    }
    assert imports["window"].as_module() == "refold.ops.window"
    assert imports["RefoldError"].as_module() is None


class Wheel(PlainData):
    """A kind that is chosen by `type`."""

    type: str
    size: float = 1.0


class Spoked(Wheel):
    """One kind."""

    type: str = "spoked"
    spokes: tuple[int, ...] = ()


class Cart(PlainData):
    """Holds another object."""

    wheel: Wheel
    names: dict[str, int] | None = None


def test_plain_data_is_read_and_written():
    data = {"wheel": {"type": "spoked", "size": 2, "spokes": [1, 2]}, "names": {"a": 1}}
    cart = Cart.model_validate(data)
    wheel = Spoked.model_validate({"type": "spoked", "size": 2.0, "spokes": (1, 2)})
    assert cart.wheel == wheel
    assert hash(cart.wheel) == hash(wheel)
    assert cart.model_dump() == {"wheel": {"type": "spoked", "size": 2.0, "spokes": [1, 2]}, "names": {"a": 1}}
    assert cart.model_copy({"names": None}).names is None
    assert Cart.model_validate(cart) is cart


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({}, r"blueprint: exactly the fields of Cart are required .unknown: none, missing: \['wheel'\]."),
        ({"wheel": {"type": "spoked"}, "rim": 1}, r"fields of Cart are required .unknown: \['rim'\], missing: none."),
        ({"wheel": 3}, r"blueprint.wheel: a mapping is required .got 3."),
        ({"wheel": {"type": "round"}}, r"blueprint.wheel.type: the type of a Wheel is required .got 'round'."),
        ({"wheel": {"type": "spoked", "spokes": [1, "a"]}}, r"wheel.spokes\[1\]: int is required .got 'a'.; take an"),
        ({"wheel": {"type": "spoked", "size": True}}, r"wheel.size: float is required .got True."),
        ({"wheel": {"type": "spoked"}, "names": {"a": "b"}}, r"blueprint.names.a: int is required .got 'b'."),
    ],
)
def test_damaged_data_is_refused_by_place(data: dict, told: str):
    with pytest.raises(RecipeError, match=told):
        Cart.model_validate(data)
