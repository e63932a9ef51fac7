"""An analysis finds planted layers, writes its results, and replaces no folder of others."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import refold
from refold.analysis.analyse import AnalysisSettings
from refold.analysis.conclusion import least_important, most_alike
from refold.calibration.moments import MomentStore
from refold.data.readers import from_documents
from refold.errors import DataError, FolderError, RecipeError

TEXT = from_documents(
    [f"Chapter {number}: the sea was calm, and {number * 7} ships lay on it." for number in range(99)]
)
QUICK = AnalysisSettings(tokens=256, context=32)
TWINS, IDLE = (1, 4), 3


@pytest.fixture(scope="module")
def plain(make_model) -> Path:
    return make_model("llama", num_hidden_layers=6)


@pytest.fixture(scope="module")
def planted(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source whose layer 4 is a copy of layer 1, and whose layer 3 does next to nothing."""
    folder = tmp_path_factory.mktemp("planted")
    for file in plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if f"layers.{TWINS[1]}." in name:
            tensors[name] = tensors[name.replace(f"layers.{TWINS[1]}.", f"layers.{TWINS[0]}.")].clone()
        if re.search(rf"layers\.{IDLE}\..*(o_proj|down_proj)", name):
            tensors[name] = tensors[name] * 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_twins_and_an_idle_layer_are_named(planted: Path, plain: Path) -> None:
    found, control = (refold.analyse(source, data=TEXT, settings=QUICK) for source in (planted, plain))
    assert all(layers[0] == IDLE for layers in least_important(found.influence).values())
    assert found.influence.block[IDLE] < 1e-3 < 1e-2 < min(v for i, v in enumerate(found.influence.block) if i != IDLE)
    distance, *pair = most_alike(found.similarity)[0]
    assert pair == [*TWINS]
    assert distance == pytest.approx(0.0, abs=1e-7)
    assert most_alike(found.similarity)[1][0] > 0.5
    # Layers 1 and 4 are tied by three loops of two and by two loops of three.
    by_way = {(each.pattern, each.loops): each.linears["q_proj"].lost for each in found.spectra}
    unplanted = {(each.pattern, each.loops): each.linears["q_proj"].lost for each in control.spectra}
    assert by_way["cycle", 2] < unplanted["cycle", 2] - 0.1
    assert by_way["sequence", 2] == pytest.approx(unplanted["sequence", 2], abs=0.1)
    assert control.influence.block[IDLE] > 1e-2
    assert most_alike(control.similarity)[0][0] > 0.5


@torch.no_grad()
def test_what_is_named_can_be_dropped_and_what_is_not_cannot(planted: Path, tmp_path: Path) -> None:
    refold.analyse(planted, tmp_path / "analysed", TEXT, settings=QUICK)
    ids = torch.randint(3, 299, (2, 24), generator=torch.Generator().manual_seed(1))
    logits = AutoModelForCausalLM.from_pretrained(planted)(ids).logits

    def distance(name: str, drop: dict) -> float:
        made = refold.convert(planted, tmp_path / name, {"drop": drop}, measurements=tmp_path / "analysed")
        assert made.influence is not None or "layers" in next(iter(drop.values()))
        return float((refold.load_model(tmp_path / name)(ids).logits - logits).abs().max() / logits.abs().max())

    assert distance("least", {"block": {"count": 1, "by": "similarity"}}) < 0.02
    assert distance("both", {"sublayers": {"count": 2}}) < 0.02
    assert distance("other", {"block": {"layers": [2]}}) > 0.1
    assert distance("nothing", {"sublayers": {"count": 0}}) < 1e-5


def test_the_folder_holds_measurements_figures_and_one_page(planted: Path, tmp_path: Path) -> None:
    out = tmp_path / "analysed"
    steps: list[tuple[int, int]] = []
    refold.analyse(planted, out, TEXT, settings=QUICK, progress=lambda *at: steps.append(at))
    assert steps == [(done, 6 + 7 * 5) for done in range(1, 6 + 7 * 5 + 1)]
    figures = ("influence", "weights", "streams", "spectra", "moments")
    expected = {
        "measurements.json",
        "index.html",
        "manifest.json",
        *(f"{n}.{k}" for n in figures for k in ("png", "svg")),
    }
    assert {path.name for path in out.iterdir()} == expected
    page = (out / "index.html").read_text()
    assert page.count("<svg") == 5
    assert f"least important, block: layers {IDLE}" in page
    assert "<h2>Conclusion</h2>" in page
    assert f"Layers {IDLE} change the stream by less than a third of the median" in page
    assert page.count('<div class="scroll"><table>') == page.count("<table>")  # Nothing is cut off on a telephone.
    assert not re.search(r"<(script|img|link)|(src|href)=\"http", page)


def test_a_folder_is_replaced_only_when_asked_and_never_anybody_elses(planted: Path, tmp_path: Path) -> None:
    quick = AnalysisSettings(tokens=32, context=16, spectra=False)
    refold.analyse(planted, tmp_path / "ours", settings=quick)
    with pytest.raises(FolderError, match="--overwrite"):
        refold.analyse(planted, tmp_path / "ours", settings=quick)
    refold.analyse(planted, tmp_path / "ours", settings=quick, overwrite=True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("mine")
    with pytest.raises(FolderError, match="never overwritten"):
        refold.analyse(planted, tmp_path / "theirs", settings=quick, overwrite=True)


def test_moments_are_stored_when_asked_and_summed_up_always(planted: Path, tmp_path: Path) -> None:
    found = refold.analyse(planted, tmp_path / "out", TEXT, settings=AnalysisSettings(256, 32, moments=True))
    store = MomentStore(tmp_path / "out" / "moments")
    for layer, linears in enumerate(found.moments):
        assert set(linears) == {"q_proj", "o_proj", "up_proj", "down_proj"}
        for name, summary in linears.items():
            values = torch.linalg.eigvalsh(store.read(layer, name).inputs.double())
            assert summary.trace == pytest.approx(float(values.sum()), rel=1e-5)
            assert summary.participation_ratio == pytest.approx(
                float(values.sum().square() / values.square().sum()), rel=1e-4
            )
    assert refold.analyse(planted, data=TEXT, settings=QUICK).moments == found.moments
    with pytest.raises(DataError, match="give --out DIR"):
        refold.analyse(planted, settings=AnalysisSettings(moments=True))


def test_without_text_tokens_are_random_and_a_note_says_so(planted: Path) -> None:
    found = refold.analyse(planted, settings=AnalysisSettings(tokens=64, context=16, spectra=False))
    assert (found.text.kind, found.text.tokens, found.spectra) == ("random", 64, ())
    assert "give text with --data" in found.notes[0]
    (one_kind,) = refold.analyse(planted, data=TEXT, settings=QUICK).notes
    assert "0.65 on documentation" in one_kind


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(DataError, match=r"at least 2 tokens and a context of 2 are required \(got 1 and 512\)"):
        AnalysisSettings(tokens=1)


def test_stored_moments_weigh_a_conversion_as_the_text_does(planted: Path, tmp_path: Path) -> None:
    refold.analyse(planted, tmp_path / "found", TEXT, settings=AnalysisSettings(256, 32, moments=True))
    recipe = {"factor": {"parameters": 0.6}, "calibration": {"tokens": 256, "context": 32}}
    refold.convert(planted, tmp_path / "handed", recipe, measurements=tmp_path / "found")
    refold.convert(planted, tmp_path / "text", recipe, calibration=TEXT)
    unweighed = {"factor": {"parameters": 0.6, "weight": "none"}}
    refold.convert(planted, tmp_path / "none", unweighed)
    handed, text, none = (load_file(tmp_path / name / "model.safetensors") for name in ("handed", "text", "none"))

    def product(tensors: dict[str, Tensor]) -> Tensor:
        return tensors["model.mlps.0.down_proj.b.weight"] @ tensors["model.mlps.0.down_proj.a.weight"]

    torch.testing.assert_close(product(handed), product(text), atol=1e-4, rtol=1e-3)
    assert float((product(none) - product(text)).abs().max()) > 1e-2
    with pytest.raises(RecipeError, match="calibration text is required"):
        refold.convert(planted, tmp_path / "fisher", {**recipe, "factor": {"parameters": 0.6, "weight": "fisher"}})
