"""Aligned layers compute the same, and similar neurons and heads are tied."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from refold.calibration.frames import FramedPieces, HeadFrame, LayerFrame
from refold.checkpoint.reader import CheckpointReader
from refold.conversion.alignment import align_layers
from refold.conversion.convert import ConvertOptions, convert
from refold.conversion.target_tensors import TargetBuilder
from refold.errors import RecipeError, SourceError
from refold.families.arch import ArchSpec
from refold.modeling.configuration import RefoldConfig
from refold.modeling.load import load_model
from refold.modeling.model import RefoldForCausalLM
from refold.planning.build import identity_blueprint
from refold.planning.plan import plan, plan_model
from refold.recipe.load import load_recipe
from refold.sources.pieces import PieceReader
from refold.sources.source_model import read_source_model

VARIANTS = ("llama", "llama-mha-bias", "llama-mqa-mlp-bias", "gpt_neox", "gemma2", "olmo2-bias", "qwen3", "phi3")
IDS = torch.arange(3, 40)[None]


def random_frame(arch: ArchSpec, seed: int) -> LayerFrame:
    generator = torch.Generator().manual_seed(seed)
    groups, readers = arch.num_key_value_heads, arch.num_attention_heads // arch.num_key_value_heads
    places = torch.randperm(groups, generator=generator)
    queries = [int(here) * readers + torch.randperm(readers, generator=generator) for here in places]
    turns = torch.linalg.qr(torch.randn(groups, arch.head_dim, arch.head_dim, generator=generator)).Q
    neurons = torch.randperm(arch.intermediate_size, generator=generator)
    return LayerFrame(neurons, HeadFrame(torch.cat(queries), places, turns))


def logits(folder: Path, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return load_model(folder, device="cpu")(ids).logits


def source_logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_source_in_other_frames_computes_the_same(make_source, variant):
    folder = make_source(variant)
    model = read_source_model(folder)
    made = plan_model(model, load_recipe(None), allow_larger=True).settle()
    frames = {layer: random_frame(model.arch, layer) for layer in (1, 2)}
    with CheckpointReader(folder) as reader:
        pieces = PieceReader(model, reader)
        plain, framed = (
            dict(TargetBuilder(made, each, torch.float32).build()) for each in (pieces, FramedPieces(pieces, frames))
        )
    target = RefoldForCausalLM(RefoldConfig(blueprint=made.blueprint.model_dump(mode="json"))).eval()
    found = []
    for tensors in (plain, framed):
        target.load_state_dict(tensors, strict=not model.arch.tied_head)
        with torch.no_grad():
            found.append(target(IDS).logits)
    assert off(found[1], found[0]) < 2e-5
    moved = {name for name, value in framed.items() if not torch.equal(value, plain[name])}
    linears = ("mixers.{}.v_proj", "mixers.{}.o_proj", "mlps.{}.up_proj", "mlps.{}.down_proj")
    assert {f"model.{linear.format(part)}.weight" for linear in linears for part in (1, 2)} <= moved
    assert not [name for name in moved if ".0." in name or ".3." in name]
    if model.arch.qkv_bias:
        assert "model.mixers.1.v_proj.bias" in moved


def planted(source: Path, folder: Path, noise: float = 0.0) -> Path:
    """A llama whose layers 2 and 3 are layers 0 and 1 in other frames, and nearly so with noise."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    model = read_source_model(source)
    frames = {0: random_frame(model.arch, 5), 1: random_frame(model.arch, 6)}
    generator = torch.Generator().manual_seed(3)
    with CheckpointReader(source) as reader:
        pieces = FramedPieces(PieceReader(model, reader), frames)
        for name in list(tensors):
            if name.startswith(("model.layers.2.", "model.layers.3.")):
                layer = int(name.split(".")[2])
                tail = name.split(".", 3)[3]
                local = tail.replace("self_attn.", "mixer.").replace("input_layernorm", "mixer.input_norm")
                local = local.replace("post_attention_layernorm", "mlp.input_norm")
                value = pieces.read(local, layer - 2, torch.float32)
                more = noise * torch.randn(value.shape, generator=generator) if value.ndim == 2 else 0
                tensors[name] = (value + more).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


FOLD = {"loops": 2, "init": "average"}


@pytest.mark.parametrize("align", ["none", "permutation", "rotation", "both"])
def test_layers_that_differ_by_their_frame_alone_fold_without_loss(make_source, tmp_path, align):
    source = planted(make_source("llama"), tmp_path / "source")
    convert(source, tmp_path / "out", {"fold": {**FOLD, "align": align}})
    lost = off(logits(tmp_path / "out"), source_logits(source))
    if align == "both":
        assert lost < 1e-4
    else:
        # Half of the symmetry is not enough, as none is.
        assert lost > 0.1


@pytest.mark.parametrize("loops", [2, 4])
def test_aligned_layers_are_nearer_to_their_mean(make_source, tmp_path, loops):
    source = planted(make_source("llama"), tmp_path / "source", noise=0.1)
    model = read_source_model(source)
    blueprint = plan(source, {"fold": {"loops": loops, "init": "average"}}).blueprint

    def spread(framed: PieceReader) -> float:
        total = 0.0
        for part in range(len(blueprint.mixers)):
            layers = [blueprint.depths[user].source for user in blueprint.users("mixer", part)]
            for name in ("mixer.q_proj", "mixer.v_proj", "mixer.o_proj", "mlp.gate_proj", "mlp.down_proj"):
                weights = torch.stack([framed.read(f"{name}.weight", layer, torch.float32) for layer in layers])
                total += float((weights - weights.mean(0)).square().sum())
        return total

    with CheckpointReader(source) as reader:
        pieces = PieceReader(model, reader)
        found = {}
        for align in ("none", "permutation", "rotation", "both"):
            framed = FramedPieces(pieces, {} if align == "none" else align_layers(blueprint, align, pieces))
            found[align] = spread(framed)
    assert found["both"] < min(found["permutation"], found["rotation"])
    assert max(found["permutation"], found["rotation"]) < found["none"]
    if loops == 2:
        assert found["both"] < 0.2 * found["none"]


@pytest.mark.parametrize("variant", ["llama", "llama-mha-bias", "qwen3", "gpt_neox", "olmo2-bias"])
def test_an_aligned_fold_with_full_rank_is_the_source(make_source, tmp_path, variant):
    source = make_source(variant)
    relax = {"rank": "full", "init": "joint", "vectors": "own"}
    convert(
        source,
        tmp_path / "out",
        {"fold": {**FOLD, "align": "both"}, "relax": relax},
        options=ConvertOptions(allow_larger=True),
    )
    assert off(logits(tmp_path / "out"), source_logits(source)) < 1e-4
    plain = tmp_path / "plain"
    convert(source, plain, {"fold": FOLD, "relax": relax}, options=ConvertOptions(allow_larger=True))
    one, other = (load_file(each / "model.safetensors") for each in (tmp_path / "out", plain))
    assert not torch.allclose(one["model.mlps.0.up_proj.weight"], other["model.mlps.0.up_proj.weight"], atol=0.05)
    # The first layer's frame is the common one.
    vectors = [name for name in one if name.startswith("model.depths.0.vectors.")]
    assert vectors
    assert all(torch.equal(one[name], other[name]) for name in vectors)


@pytest.mark.parametrize("order", ["at_once", "sequential"])
def test_moments_are_in_the_frame_of_the_weights(make_model: Callable[..., Path], sentences, tmp_path, order):
    source = planted(make_model("llama"), tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(sentences * 10))
    recipe = {
        "fold": {"loops": 2, "align": "both"},
        "relax": {"rank": 2, "init": "joint", "vectors": "own", "weight": "fisher"},
        "calibration": {"tokens": 256, "context": 32, "order": order},
    }
    convert(source, tmp_path / "out", recipe, options=ConvertOptions(allow_larger=True), calibration=text)
    assert off(logits(tmp_path / "out"), source_logits(source)) < 1e-3


def test_shared_keys_and_other_mixers_are_not_aligned_and_the_plan_says_so(make_source):
    source = make_source("llama")
    shared = plan(source, {"fold": {**FOLD, "align": "both"}, "share_kv": [{"depth": 3, "from": 1}]})
    assert "fold.align: attention of layers [1, 3] not aligned: keys and values are shared between depths" in map(
        str, shared.notes
    )
    assert "fold.align: both: attention of layers [0, 2] aligned to the first layer of each group" in map(
        str, shared.notes
    )
    assert "fold.align: both: MLPs of layers [0, 2], [1, 3] aligned to the first layer of each group" in map(
        str, shared.notes
    )
    swapped = plan(source, {"fold": {**FOLD, "align": "rotation"}, "mixers": [{"type": "retention"}]})
    assert "fold.align: attention of layers [0, 2] not aligned: they become retention" in map(str, swapped.notes)
    assert not [note for note in map(str, plan(source, {"fold": FOLD}).notes) if "fold.align" in note]


def test_what_is_left_as_it_is_gives_the_same_bytes(make_source, tmp_path):
    source = make_source("llama")
    convert(source, tmp_path / "one", {"fold": FOLD})
    convert(source, tmp_path / "other", {"fold": {**FOLD, "align": "none", "scale": "none"}})
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other
    frames = align_none(source)
    assert frames == {}


def align_none(source: Path) -> dict[int, LayerFrame]:
    model = read_source_model(source)
    with CheckpointReader(source) as reader:
        return align_layers(identity_blueprint(model.arch), "both", PieceReader(model, reader))


@pytest.mark.parametrize("relax", [None, {"rank": 2, "init": "zero"}])
def test_scaled_means_have_the_mean_norm(make_source, tmp_path, relax):
    source = make_source("llama")
    convert(source, tmp_path / "out", {"fold": {**FOLD, "scale": "norm"}, **({"relax": relax} if relax else {})})
    convert(source, tmp_path / "mean", {"fold": FOLD, **({"relax": relax} if relax else {})})
    found, mean, own = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tmp_path / "mean", source)
    )
    norms = [own[f"model.layers.{layer}.mlp.up_proj.weight"].norm() for layer in (1, 3)]
    scaled, plain = (each["model.mlps.1.up_proj.weight"] for each in (found, mean))
    assert float(scaled.norm()) == pytest.approx(float(sum(norms) / 2), rel=1e-5)
    assert torch.allclose(scaled / scaled.norm(), plain / plain.norm(), atol=1e-6)
    assert float(plain.norm()) < 0.8 * float(scaled.norm())
    assert torch.equal(found["model.mlps.1.input_norm.weight"], mean["model.mlps.1.input_norm.weight"])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"fold": {"loops": 2, "align": "both"}},
            r"fold\.align: both requires fold\.init average.*stepwise",
        ),
        ({"fold": {"loops": 2, "scale": "norm"}}, r"fold\.scale: norm requires fold\.init average"),
        (
            {"fold": {"loops": 2, "align": "both"}, "weights": "fresh"},
            r"fold\.align: must be none where weights are",
        ),
        (
            {"fold": {**FOLD, "scale": "norm"}, "relax": {"rank": 2}},
            r"fold\.scale: must be none where weights are fitted \(got norm with relax\.init svd",
        ),
        (
            {"fold": {**FOLD, "scale": "norm"}, "factor": {"parameters": 0.4, "weight": "none"}},
            r"fold\.scale: .*\(got norm with factor",
        ),
    ],
)
def test_what_cannot_be_aligned_or_scaled_is_refused(make_source, recipe, message):
    with pytest.raises(RecipeError, match=message):
        plan(make_source("llama"), recipe)


@pytest.mark.parametrize("linear", ["mlp.up_proj", "self_attn.v_proj"])
def test_weights_that_are_no_numbers_are_named_instead_of_matched_for_ever(make_source, tmp_path, linear):
    shutil.copytree(make_source("llama"), tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    weights[f"model.layers.2.{linear}.weight"][1, 1] = torch.nan
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    recipe = {"fold": {"loops": 2, "init": "average", "align": "both"}}
    with pytest.raises(SourceError, match=rf"layers\.2\.{linear}\.weight: finite numbers .* \(got nan at \[1, 1\]\)"):
        convert(tmp_path / "source", tmp_path / "out", recipe)
