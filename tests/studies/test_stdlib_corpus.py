"""The standard library as text: included and excluded modules, and the error if it is missing."""

import sys
import sysconfig
from pathlib import Path

import pytest

from refold.errors import DataError
from refold.studies.shipped import HELD_OUT, held_out_documents, training_documents


@pytest.fixture(scope="module")
def training() -> list[str]:
    return list(training_documents())


@pytest.fixture(scope="module")
def held_out() -> list[str]:
    return list(held_out_documents())


@pytest.fixture
def fake_stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("os.py", *(f"{name}/__init__.py" for name in HELD_OUT)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_there_is_enough_of_both(training: list[str], held_out: list[str]) -> None:
    assert sum(map(len, training)) > 5_000_000
    assert 500_000 < sum(map(len, held_out)) < 2_000_000


def test_no_document_is_in_both(training: list[str], held_out: list[str]) -> None:
    assert not set(training) & set(held_out)


def test_held_out_modules_are_the_ones_named(training: list[str], held_out: list[str]) -> None:
    import email.message
    import json.decoder
    import string

    for module, inside, outside in ((json.decoder, held_out, training), (email.message, held_out, training)):
        text = Path(str(module.__file__)).read_text(encoding="utf-8")
        assert text in inside
        assert text not in outside
    assert Path(str(string.__file__)).read_text(encoding="utf-8") in training


def test_pydoc_topics_are_training_documents(training: list[str]) -> None:
    from pydoc_data.topics import topics

    assert topics["lambda"] in training


def test_order_is_the_same_every_time(held_out: list[str]) -> None:
    assert held_out == list(held_out_documents())


def test_tests_tables_and_installed_packages_are_left_out(fake_stdlib: Path) -> None:
    kept = {"a.py": "kept = 1\n", "encodings/idna.py": "kept = 2\n", "deep/er/b.py": "kept = 3\n"}
    left_out = {
        "test/test_a.py": "left = 1\n",
        "deep/tests/c.py": "left = 2\n",
        "idlelib/idle_test/d.py": "left = 3\n",
        "site-packages/e/f.py": "left = 4\n",
        "encodings/cp037.py": "decoding_table = ''\n",
        "_sysconfigdata__linux_.py": "left = 5\n",
        "config-3.11-somewhere/python-config.py": "left = 6\n",
        "html/entities.py": "left = 7\n",
        "empty.py": "\n",
    }
    for name, text in {**kept, **left_out}.items():
        (fake_stdlib / name).parent.mkdir(parents=True, exist_ok=True)
        (fake_stdlib / name).write_text(text)
    documents = list(training_documents())
    assert documents[:4] == ["kept = 1\n", "kept = 3\n", "kept = 2\n", "# os.py\n"]
    assert not set(documents) & set(left_out.values())


def test_missing_sources_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    for documents in (training_documents, held_out_documents):
        with pytest.raises(DataError, match=r"python311.zip: .*sources are required .*neither zipped nor frozen"):
            documents()


def test_missing_held_out_modules_are_said(fake_stdlib: Path) -> None:
    (fake_stdlib / "json" / "__init__.py").unlink()
    (fake_stdlib / "json").rmdir()
    with pytest.raises(DataError, match=r"missing: json\); use a complete installation"):
        held_out_documents()


def test_missing_topics_are_said(fake_stdlib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"pydoc's topics are required .*complete installation"):
        list(training_documents())


def test_unreadable_source_is_named(fake_stdlib: Path) -> None:
    (fake_stdlib / "json" / "broken.py").write_bytes(b"# \xff\n")
    with pytest.raises(
        DataError, match=r"json.broken.py: a readable Python source is required .*mend the installation"
    ):
        list(held_out_documents())
