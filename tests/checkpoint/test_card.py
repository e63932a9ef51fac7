from pathlib import Path

import pytest

from refold.checkpoint.card import FOLDED_USAGE, STOCK_USAGE, read_licence, write_card


def test_a_card_holds_front_matter_rows_notes_and_usage(tmp_path: Path):
    write_card(tmp_path, "some/base", "A title", {"weight bytes": "12"}, ("a note",), "mit")
    assert (tmp_path / "README.md").read_text() == (
        "---\nbase_model: some/base\nlibrary_name: transformers\ntags: [refold]\nlicense: mit\n---\n\n# A title\n\n"
        f"| | |\n|---|---|\n| weight bytes | 12 |\n\n- a note\n\n```python\n{FOLDED_USAGE}\n```\n"
    )


@pytest.mark.parametrize(("usage", "named"), [(FOLDED_USAGE, True), (STOCK_USAGE, False)])
def test_only_what_needs_refold_to_load_says_so(tmp_path: Path, usage: str, named: bool):
    write_card(tmp_path, "base", "title", {}, usage=usage)
    card = (tmp_path / "README.md").read_text()
    assert ("import refold" in card) == named
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")


def test_a_licence_is_read_back_or_absent(tmp_path: Path):
    assert read_licence(tmp_path) is None
    write_card(tmp_path, "base", "title", {})
    assert read_licence(tmp_path) is None
    write_card(tmp_path, "base", "title", {}, licence="apache-2.0")
    assert read_licence(tmp_path) == "apache-2.0"
