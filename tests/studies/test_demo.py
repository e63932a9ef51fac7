import pytest

from refold.errors import FolderError
from refold.studies import demo as module
from refold.studies.demo import FOLDS, LOW_RANK, PRUNED_ALIKE, demo


def test_the_last_line_states_the_best_healed_fold(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CALIBRATION_TOKENS", 1024)
    monkeypatch.setattr(module, "EVAL_TOKENS", 1024)
    found = demo(tmp_path, heal_tokens=1024)
    rows = {row.name: row for row in found.rows}
    healed = {name: row.after.against.difference for name, row in rows.items() if row.after and row.after.against}
    assert set(healed) == {*FOLDS, PRUNED_ALIKE}
    best = min(FOLDS, key=lambda name: healed[name])
    assert found.line.startswith(f"{FOLDS[best]}: ")
    assert f"{PRUNED_ALIKE}: {healed[PRUNED_ALIKE]:+.3f}" in found.line
    assert list(found.samples) == ["source", f"{best}, healed"]
    assert rows[PRUNED_ALIKE].weight_bytes <= rows[LOW_RANK].weight_bytes
    assert rows["relaxed, full rank"].before.bits_per_byte == pytest.approx(
        rows["source"].before.bits_per_byte, abs=0.01
    )
    assert len({path.name for path in tmp_path.iterdir()}) == len(found.rows) - 1 + len(healed)


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    said = []
    with pytest.raises(FolderError, match="a writable place is required"):
        demo(tmp_path / "file", say=said.append)
    assert said == []
