"""The measuring pass of a fit, against plain forward and backward passes of transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from refold.blueprint.cost import cost
from refold.blueprint.quantisation import with_schemes
from refold.blueprint.schema import Blueprint
from refold.calibration.layers import SourceLayers
from refold.calibration.moments import MomentStore, measure_moments
from refold.calibration.swaps import MixerSwap, SampledStream
from refold.calibration.weighting import Moments
from refold.checkpoint.reader import CheckpointReader
from refold.data.packing import PackedSequence
from refold.errors import FolderError, SourceError
from refold.fitting.form_costs import timed_menu
from refold.fitting.kinds.registry import find_kind
from refold.fitting.matrix_forms import MatrixOptions, measure_matrix
from refold.fitting.measure import MeasureSettings, measure_menu
from refold.fitting.menu import Costs, MatrixForm, Menu, MenuMatrix, PartForm
from refold.fitting.saved_menu import read_menu
from refold.mixers.attention import Attention
from refold.planning.build import build_blueprint, identity_blueprint
from refold.recipe.load import load_recipe
from refold.sources.pieces import PieceReader
from refold.sources.source_model import SourceModel, read_source_model

ROWS, TOKENS, CONTEXT = 6, 32, 100
SCHEMES = ("int8", "int4", "int4z")
SETTINGS = MeasureSettings(schemes=SCHEMES, multiple=8, context=CONTEXT, neurons=8, sample_tokens=96)


class Run(NamedTuple):
    """A measured source."""

    source: Path
    model: SourceModel
    folder: Path
    menu: Menu


def sequences(vocabulary: int, rows: int = ROWS) -> PackedSequence:
    ids = torch.randint(vocabulary, (rows, TOKENS), generator=torch.Generator().manual_seed(0))
    return PackedSequence(input_ids=ids, position_ids=torch.arange(TOKENS).repeat(rows, 1), labels=ids)


def measure(source: Path, folder: Path, settings: MeasureSettings = SETTINGS) -> Run:
    model = read_source_model(source)
    with CheckpointReader(source) as reader:
        layers = SourceLayers(model, PieceReader(model, reader), rows_at_once=4)
        menu = measure_menu(layers, sequences(model.arch.vocab_size), "a text", settings, folder)
    return Run(source, model, folder, menu)


@pytest.fixture(scope="module")
def llama(make_source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return measure(make_source("llama"), tmp_path_factory.mktemp("measured"))


def forms_of(menu: Menu, layer: int, pool: str, kind: str) -> list[PartForm]:
    part = next(part for part in menu.parts if (part.layer, part.pool) == (layer, pool))
    return [form for form in part.forms if form.kind == kind]


def whole_matrices(menu: Menu) -> list[MenuMatrix]:
    return [*(matrix for part in menu.parts for matrix in part.forms[0].matrices), *menu.outer]


def total(menu: Menu, chosen: list[MatrixForm], beside: list[Costs]) -> Costs:
    costs = menu.fixed
    for each in (*beside, *(form.costs for form in chosen)):
        costs = costs.plus(each)
    return costs


def counted(blueprint: Blueprint) -> Costs:
    found = cost(blueprint, 2)
    return Costs(found.weight_bytes, found.cache_bytes(CONTEXT), found.flops(CONTEXT))


FEW = SETTINGS.model_copy(update={"kinds": ("drop",), "ties": False, "multiple": 32, "schemes": ("int8",)})
"""Settings that take little time."""


@pytest.mark.parametrize("variant", ["qwen2-window", "gemma2", "llama-mqa-mlp-bias"])
def test_a_whole_menu_costs_what_the_source_costs(make_source, tmp_path, variant):
    menu = measure(make_source(variant), tmp_path, FEW).menu
    model = read_source_model(make_source(variant))
    beside = [part.forms[0].costs for part in menu.parts]
    found = total(menu, [matrix.forms[0] for matrix in whole_matrices(menu)], beside)
    assert found == menu.source == counted(identity_blueprint(model.arch))
    assert {form.kind for part in menu.parts for form in part.forms} == {"whole", "drop"}


def test_schemes_and_ranks_cost_what_the_blueprint_costs(llama):
    """Random forms of all matrices, built as a blueprint."""
    menu, identity = llama.menu, identity_blueprint(llama.model.arch)
    generator = torch.Generator().manual_seed(5)

    def draw(matrix: MenuMatrix) -> MatrixForm:
        return matrix.forms[int(torch.randint(len(matrix.forms), (), generator=generator))]

    for _ in range(3):
        forms = {(part.pool, part.layer): [draw(m) for m in part.forms[0].matrices] for part in menu.parts}
        schemes: dict[str, str | None] = {}
        made = identity
        for (pool, layer), drawn in forms.items():
            names = [matrix.name for matrix in forms_of(menu, layer, pool, "whole")[0].matrices]
            factors = {name: form.rank for name, form in zip(names, drawn, strict=True) if form.rank is not None}
            parts = list(made.pool(pool))
            parts[layer] = parts[layer].model_copy(update={"factors": factors})
            made = made.model_copy(update={f"{pool}s": tuple(parts)})
            for name, form in zip(names, drawn, strict=True):
                for end in (".weight",) if form.rank is None else (".a.weight", ".b.weight"):
                    schemes[f"model.{pool}s.{layer}.{name}{end}"] = form.scheme
        outer = [draw(matrix) for matrix in menu.outer]
        schemes |= dict(zip(("model.embed_tokens.weight", "lm_head.weight"), (f.scheme for f in outer), strict=True))
        beside = [part.forms[0].costs for part in menu.parts]
        drawn_forms = [form for drawn in forms.values() for form in drawn]
        assert any(form.rank is not None and form.scheme is not None for form in drawn_forms)
        assert total(menu, [*drawn_forms, *outer], beside) == counted(with_schemes(made, schemes))


def written(menu: Menu, model: SourceModel, chosen: list[tuple[int, str, PartForm]]) -> tuple[Costs, dict]:
    """Costs of a menu with some forms, and the recipe that their kinds write."""
    recipe: dict = {}
    for kind in dict.fromkeys(form.kind for _, _, form in chosen):
        for pool in ("mixer", "mlp"):
            own = {layer: form for layer, where, form in chosen if where == pool and form.kind == kind}
            find_kind(kind).write(recipe, model.arch, own, pool)
    taken = {(layer, pool): form for layer, pool, form in chosen}
    forms = [taken.get((part.layer, part.pool), part.forms[0]) for part in menu.parts]
    matrices = [*(matrix for form in forms for matrix in form.matrices), *menu.outer]
    return total(menu, [matrix.forms[0] for matrix in matrices], [form.costs for form in forms]), recipe


def test_forms_of_parts_cost_what_their_recipes_build(llama):
    menu, arch = llama.menu, llama.model.arch
    linear = [form for form in forms_of(menu, 2, "mixer", "mixer") if form.setting["type"] == "linear_attention"]
    chosen = [
        (1, "mixer", forms_of(menu, 1, "mixer", "share_kv")[0]),
        (2, "mixer", linear[-1]),
        (3, "mixer", forms_of(menu, 3, "mixer", "drop")[0]),
        (0, "mlp", forms_of(menu, 0, "mlp", "drop")[0]),
    ]
    found, recipe = written(menu, llama.model, chosen)
    made = build_blueprint(arch, load_recipe(recipe)).blueprint
    assert found == counted(made)
    assert recipe["drop"] == {"attention": {"layers": [3]}, "mlp": {"layers": [0]}}
    assert recipe["share_kv"] == [{"depth": 1, "from": 0}]
    narrow = [(2, "mixer", forms_of(menu, 2, "mixer", "width")[0]), (1, "mlp", forms_of(menu, 1, "mlp", "width")[2])]
    found, recipe = written(menu, llama.model, narrow)
    assert recipe["width"]["heads"] == [2, 2, 1, 2]
    assert found == counted(build_blueprint(arch, load_recipe(recipe)).blueprint)
    windows, recipe = written(menu, llama.model, [(1, "mixer", forms_of(menu, 1, "mixer", "mixer")[0])])
    assert recipe["mixers"] == [{"type": "attention", "window": 16, "depths": [1]}]
    assert windows == counted(build_blueprint(arch, load_recipe(recipe)).blueprint)


def test_moments_are_those_of_a_conversion(llama, tmp_path):
    """The pass of a fit and the pass of a conversion store the same moments."""
    store = MomentStore(tmp_path)
    with CheckpointReader(llama.source) as reader:
        layers = SourceLayers(llama.model, PieceReader(llama.model, reader), rows_at_once=4)
        packed = sequences(llama.model.arch.vocab_size)
        measure_moments(layers, packed, store, tmp_path, with_gradients=True)
    mine = MomentStore(llama.folder / "moments")
    mine.check(llama.model.source.fingerprint(), with_gradients=True)
    for linear in ("q_proj", "down_proj"):
        for one, other in zip(mine.read(2, linear), store.read(2, linear), strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)


def test_losses_are_ordered(llama):
    menu = llama.menu
    for part in menu.parts:
        assert part.forms[0].kind == "whole"
        assert part.forms[0].loss == 0.0
        for matrix in part.forms[0].matrices:
            assert (matrix.forms[0].rank, matrix.forms[0].scheme, matrix.forms[0].loss) == (None, None, 0.0)
            losses = {(form.rank, form.scheme): form.loss for form in matrix.forms}
            assert 0 < losses[None, "int8"] < 1e-2 * max(losses.values())
            ranks = sorted(rank for rank, scheme in losses if rank is not None and scheme is None)
            floats = [losses[rank, None] for rank in ranks]
            assert floats == sorted(floats, reverse=True)
        narrow = [form.loss for form in part.forms if form.kind == "width"]
        assert narrow == sorted(narrow)
        assert narrow[-1] > 0


def plain_drop_losses(run: Run, labels: Tensor) -> dict[tuple[int, str], float]:
    """E[(g . u)^2] / 2 of every attention and MLP, by hooks on transformers in float64."""
    model = AutoModelForCausalLM.from_pretrained(run.source, dtype=torch.float64, attn_implementation="eager").eval()
    found: dict[tuple[int, str], float] = {}

    def watch(layer: int, pool: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            update = output[0] if isinstance(output, tuple) else output

            def back(gradient: Tensor) -> None:
                found[layer, pool] = float((gradient * update.detach()).sum(-1).square().mean()) / 2

            update.register_hook(back)

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(watch(index, "mixer"))
        layer.mlp.register_forward_hook(watch(index, "mlp"))
    logits = model(input_ids=sequences(run.model.arch.vocab_size).input_ids).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    return found


def test_losses_of_dropped_parts_are_those_of_a_plain_backward_pass(make_source, tmp_path, monkeypatch):
    from refold.calibration import moments

    def pick(chances: Tensor, count: int, generator: torch.Generator) -> Tensor:
        return chances.topk(3, dim=-1).indices[:, 2:]

    monkeypatch.setattr(moments.torch, "multinomial", pick)
    run = measure(make_source("llama"), tmp_path, FEW)
    model = AutoModelForCausalLM.from_pretrained(run.source, dtype=torch.float64).eval()
    logits = model(input_ids=sequences(run.model.arch.vocab_size).input_ids).logits
    expected = plain_drop_losses(run, logits.topk(3, dim=-1).indices[..., 2])
    assert len(expected) == 2 * run.model.arch.num_layers
    for (layer, pool), loss in expected.items():
        (form,) = forms_of(run.menu, layer, pool, "drop")
        assert form.loss == pytest.approx(loss, rel=1e-3)
    others = plain_drop_losses(run, logits.topk(3, dim=-1).indices[..., 0])
    assert forms_of(run.menu, 1, "mlp", "drop")[0].loss != pytest.approx(others[1, "mlp"], rel=1e-2)


def stream_before(run: Run, layer: int) -> Tensor:
    with CheckpointReader(run.source) as reader:
        layers = SourceLayers(run.model, PieceReader(run.model, reader))
        packed = sequences(run.model.arch.vocab_size, rows=2)
        return {each.index: states for each, states in layers.walk(packed)}[layer]


def test_swaps_run_what_a_converted_model_would_run(llama):
    """A window as wide as the text changes nothing, a narrow one does; own keys give the attention itself."""
    places = torch.arange(TOKENS).repeat(2, 1)
    with CheckpointReader(llama.source) as reader:
        layers = SourceLayers(llama.model, PieceReader(llama.model, reader))
        stream = SampledStream(stream_before(llama, 1), places)
        swap = MixerSwap(layers, 1, stream)
        seen: list[Tensor] = []
        layers.load(1).run(stream.states, places, None, lambda index, pool, x, update: seen.append(update))
        wide, narrow = swap.update(Attention(), TOKENS, {}), swap.update(Attention(), 4, {})
        assert torch.allclose(wide, seen[0], atol=1e-4)
        assert torch.allclose(narrow[:, :4], seen[0][:, :4], atol=1e-4)
        assert not torch.allclose(narrow, seen[0], atol=1e-2)
        assert torch.allclose(swap.update_with_keys(1, stream), seen[0], atol=1e-4)
        other = SampledStream(stream_before(llama, 0), places)
        assert not torch.allclose(swap.update_with_keys(0, other), seen[0], atol=1e-2)


def test_a_text_shorter_than_a_linear_is_wide_has_forms():
    """The moments of three tokens are singular."""
    x, g = (torch.randn(3, size, generator=torch.Generator().manual_seed(size)) for size in (48, 32))
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(1))
    moments = Moments(x.T @ x / 3, g.T @ g / 3)
    forms = measure_matrix("up_proj", weight, moments, MatrixOptions(multiple=4)).forms
    losses = {(form.rank, form.scheme): form.loss for form in forms}
    assert all(0 <= loss < float("inf") for loss in losses.values())
    assert losses[None, "int8"] < losses[None, "int3g64"]


def test_times_are_those_of_the_clock(llama):
    menu = timed_menu(llama.menu, lambda rows, columns, scheme, rank: rows + columns / 1000 + (rank or 0) / 1e6)
    arch = llama.model.arch
    up = next(m for m in menu.parts[1].forms[0].matrices if m.name == "up_proj")
    assert up.forms[0].costs.milliseconds == arch.intermediate_size + arch.hidden_size / 1000
    narrow = forms_of(menu, 0, "mlp", "width")[-1]
    assert narrow.matrices[0].forms[0].costs.milliseconds == narrow.setting["neurons"] + arch.hidden_size / 1000
    tied = next(tie for tie in menu.ties if tie.pool == "mlp")
    assert tied.matrices[0].forms[0].costs.milliseconds == 2 * up.forms[0].costs.milliseconds
    assert menu.outer[0].name == "embedding"
    assert menu.outer[0].forms[0].costs.milliseconds == 0.0
    assert menu.outer[1].forms[0].costs.milliseconds > 0
    whole = total(menu, [matrix.forms[0] for matrix in whole_matrices(menu)], [])
    assert menu.source.milliseconds == pytest.approx(whole.milliseconds)
    assert llama.menu.source.milliseconds == 0.0


def test_a_tie_costs_half_of_the_bytes_and_all_of_the_work(llama):
    tie = llama.menu.ties[0]
    parts = [part.forms[0] for part in llama.menu.parts if part.pool == "mixer" and part.layer in (0, 1)]
    assert tie.layers == (0, 1)
    assert tie.loss > 0
    assert tie.costs == parts[0].costs.plus(parts[1].costs)
    for shared, one, two in zip(tie.matrices, parts[0].matrices, parts[1].matrices, strict=True):
        assert shared.forms[0].costs.bytes == one.forms[0].costs.bytes
        assert shared.forms[0].costs.flops == one.forms[0].costs.flops + two.forms[0].costs.flops


def test_a_menu_is_read_again_or_refused(llama, make_source, tmp_path):
    source = llama.model.source
    assert read_menu(llama.folder, source) == llama.menu
    with CheckpointReader(llama.source) as reader:
        layers = SourceLayers(llama.model, PieceReader(llama.model, reader))
        packed = sequences(llama.model.arch.vocab_size)
        same = SETTINGS.measured(layers, packed, "a text")
        wider = SETTINGS.model_copy(update={"context": 101}).measured(layers, packed, "a text")
        longer = SETTINGS.measured(layers, sequences(96, rows=7), "a text")
    assert read_menu(llama.folder, source, same) == llama.menu
    with pytest.raises(SourceError, match=r"a menu with context 101 is required \(got 100\); measure again"):
        read_menu(llama.folder, source, wider)
    with pytest.raises(SourceError, match=r"a menu with tokens 224 is required \(got 192\)"):
        read_menu(llama.folder, source, longer)
    other = read_source_model(make_source("gpt_neox")).source
    with pytest.raises(SourceError, match=r"a menu of .* is required \(got another source's\)"):
        read_menu(llama.folder, other)
    with pytest.raises(FolderError, match="a menu of measured choices is required"):
        read_menu(tmp_path, source)
    found = json.loads((llama.folder / "menu.json").read_text())
    (tmp_path / "menu.json").write_text(json.dumps({**found, "format": 2}))
    with pytest.raises(FolderError, match=r"a menu of format 1 is required \(format: .*\); measure again"):
        read_menu(tmp_path, source)


def test_the_same_text_gives_the_same_menu(llama, tmp_path):
    first, again = (measure(llama.source, tmp_path, FEW) for _ in range(2))
    assert first.menu == again.menu
    assert not (tmp_path / "scratch").exists()
