"""The measurements of a fit: a source and a text in, the menu of all choices with losses and costs out."""

import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from refold.blueprint.cost import cost, count_parameters
from refold.blueprint.integers import find_scheme
from refold.blueprint.schema import POOLS, MixerPart, Pool
from refold.calibration.layers import SourceLayers
from refold.calibration.moments import MomentStore
from refold.calibration.swaps import MixerSwap, SampledStream
from refold.conversion.progress import StepReport
from refold.data.packing import PackedSequence
from refold.fitting.form_costs import FLOAT_BYTES
from refold.fitting.kinds.kind import MeasuredPart, PartSample
from refold.fitting.kinds.registry import PART_KINDS
from refold.fitting.kinds.share_kv import can_share
from refold.fitting.matrix_forms import MatrixOptions, measure_matrix, pruned
from refold.fitting.menu import Costs, Menu, MenuMatrix, PartForm, PartMenu, TieForm
from refold.fitting.outer_forms import outer_matrices
from refold.fitting.sample import SamplePlan, SampleStore
from refold.fitting.saved_menu import MeasuredOn, SavedMenu
from refold.fitting.sensitivity_pass import Ends, run_both_ways
from refold.fitting.ties import Tied, can_tie, tie_form, tie_loss
from refold.mixers.spec import MLP
from refold.planning.build import identity_blueprint

MOMENTS_NAME, SCRATCH_NAME = "moments", "scratch"
OUTER_LEAST_BITS = 4
"""Fewest bits of embedding and head: below, the few tokens of a text say too little about the rows of all others."""


class MeasureSettings(MatrixOptions):
    """The settings of the measurements."""

    context: Annotated[int, Field(gt=0)]
    """Tokens at which cache and FLOPs are counted."""
    kinds: tuple[str, ...] = tuple(kind.name for kind in PART_KINDS)
    """Kinds of choice about parts that are measured; the whole part always is."""
    ties: bool = True
    """Whether ties of neighbouring layers are measured."""
    neurons: Annotated[int, Field(gt=0)] = 32
    """Numbers of neurons of narrower MLPs are multiples of this number."""
    sample_tokens: Annotated[int, Field(gt=0)] = 2048
    """Most tokens at which the updates of parts are kept."""
    seed: int = 0

    def measured(self, layers: SourceLayers, packed: PackedSequence, text: str) -> MeasuredOn:
        """Returns the record of a measurement with these settings."""
        return MeasuredOn(
            source=layers.model.source.fingerprint(),
            text=text,
            tokens=packed.input_ids.numel(),
            settings=self.model_dump(mode="json"),
        )


def measure_menu(
    layers: SourceLayers,
    packed: PackedSequence,
    text: str,
    settings: MeasureSettings,
    folder: Path,
    progress: StepReport = lambda done, steps: None,
) -> Menu:
    """Measures all choices of a fit; one layer is in memory at a time.

    The text runs forward and back once. The moments of all linears stay in `folder/moments`, where a conversion uses
    them again (`carry_out(..., moments=folder / "moments")`), and the menu in `folder/menu.json`. Milliseconds are
    zero; `timed_menu` fills them in for a device.

    With n the widest side of a linear, the peak of memory is the weights of a layer in float32, its moments, and four
    matrices `[n, n]` in float64 for a decomposition.

    Args:
        layers: Layers of the source.
        packed: Packed tokens of calibration text.
        text: Name of the text.
        settings: Schemes, ranks, kinds, and the size of samples.
        folder: Folder of the results; made where it is missing. Former results are replaced.
        progress: Called with the steps done and all steps.

    Raises:
        FolderError: The folder cannot be written.
        SourceError: The source is damaged.
    """
    scratch = folder / SCRATCH_NAME
    shutil.rmtree(scratch, ignore_errors=True)
    for each in (folder / MOMENTS_NAME, scratch):
        each.mkdir(parents=True, exist_ok=True)
    store = MomentStore(folder / MOMENTS_NAME)
    samples = SampleStore(scratch, SamplePlan(packed, settings.sample_tokens, settings.seed))
    num_layers = layers.arch.num_layers
    tell = lambda done, steps: progress(done, 3 * num_layers)  # noqa: E731
    ends = run_both_ways(layers, packed, store, samples, scratch, settings.seed, tell)
    record = settings.measured(layers, packed, text)
    store.sign(record.source, record.tokens, text)
    measuring = _Measuring(layers, store, samples, settings)
    for index in range(num_layers):
        measuring.add(index)
        progress(2 * num_layers + index + 1, 3 * num_layers)
    menu = measuring.menu(packed.input_ids, ends)
    shutil.rmtree(scratch)
    SavedMenu(measured=record, menu=menu).write(folder)
    return menu


class _Measuring:
    """Measures the forms of one layer after another."""

    def __init__(self, layers: SourceLayers, store: MomentStore, samples: SampleStore, settings: MeasureSettings):
        self._layers, self._store, self._samples, self._settings = layers, store, samples, settings
        self._arch = layers.arch
        self._parts: list[PartMenu] = []
        self._ties: list[TieForm] = []
        self._before: dict[Pool, list[MenuMatrix]] = {}
        """Matrices of the former layer with all their forms."""

    def add(self, layer: int) -> None:
        """Measures both parts of a layer, and its ties with the layer before it."""
        for pool in POOLS:
            part = self._read(layer, pool)
            whole = [
                measure_matrix(name, weight, part.moments[name], self._settings, self._settings.seed)
                for name, weight in part.weights.items()
            ]
            forms = tuple(_prune_part(form) for form in self._forms(part, whole))
            self._parts.append(PartMenu(layer=layer, pool=pool, forms=forms))
            del part
            if self._settings.ties and layer and can_tie(self._arch, pool, layer - 1):
                loss = tie_loss(
                    [matrix.name for matrix in whole], layer - 1, partial(self._weight, pool), self._store.read
                )
                tied = Tied(self._before[pool], whole)
                made = tie_form(self._arch, pool, layer - 1, tied, loss, self._settings.context)
                matrices = tuple(pruned(matrix) for matrix in made.matrices)
                self._ties.append(made.model_copy(update={"matrices": matrices}))
            self._before[pool] = whole

    def menu(self, input_ids: Tensor, ends: Ends) -> Menu:
        """Returns the menu after all layers are measured."""
        identity = identity_blueprint(self._arch)
        counted = cost(identity, FLOAT_BYTES)
        context = self._settings.context
        source = Costs(counted.weight_bytes, counted.cache_bytes(context), counted.flops(context))
        schemes = [name for name in self._settings.schemes if find_scheme(name).bits >= OUTER_LEAST_BITS]
        outer = outer_matrices(self._layers, input_ids, ends, schemes, self._settings.seed)
        norms = FLOAT_BYTES * count_parameters(identity).final_norm
        return Menu(
            parts=tuple(self._parts),
            outer=outer,
            ties=tuple(self._ties),
            fixed=Costs(bytes=norms),
            source=source,
            context=context,
        )

    def _forms(self, part: MeasuredPart, whole: list[MenuMatrix]) -> Iterator[PartForm]:
        for kind in PART_KINDS:
            if part.pool in kind.pools and (kind is PART_KINDS[0] or kind.name in self._settings.kinds):
                yield from kind.forms(part, whole)

    def _read(self, layer: int, pool: Pool) -> MeasuredPart:
        spec = MLP if pool == "mlp" else MixerPart().mixer
        names = list(spec.linears(self._arch))
        return MeasuredPart(
            arch=self._arch,
            layer=layer,
            pool=pool,
            weights={name: self._weight(pool, layer, name) for name in names},
            moments={name: self._store.read(layer, name) for name in names},
            sample=self._samples.read(layer, pool),
            context=self._settings.context,
            before=self._sample_before(layer, pool),
            multiple=self._settings.neurons,
            extras=self._extras(layer, pool),
        )

    def _weight(self, pool: Pool, layer: int, name: str) -> Tensor:
        return self._layers.pieces.read(f"{pool}.{name}.weight", layer, torch.float32)

    def _sample_before(self, layer: int, pool: Pool) -> PartSample | None:
        if pool == "mlp":
            return self._samples.read(layer, "mixer")
        return self._samples.read(layer - 1, "mlp") if layer else None

    def _extras(self, layer: int, pool: Pool) -> Mapping[str, Any]:
        found: dict[str, Any] = {"drop": self._samples.leaving(layer, pool)}
        if pool == "mlp":
            return found
        swap = MixerSwap(self._layers, layer, self._stream(layer))
        found["mixer"] = swap
        if can_share(self._arch, layer):
            found["share_kv"] = lambda: swap.update_with_keys(layer - 1, self._stream(layer - 1)).flatten(0, 1)
        return found

    def _stream(self, layer: int) -> SampledStream:
        sample = self._samples.read(layer, "mixer")
        return SampledStream(sample.by_sequence(sample.inputs), sample.by_sequence(sample.positions[:, 1]))


def _prune_part(form: PartForm) -> PartForm:
    return form.model_copy(update={"matrices": tuple(pruned(matrix) for matrix in form.matrices)})
