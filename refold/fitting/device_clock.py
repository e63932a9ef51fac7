"""Measurement of a device's table with refold's own modules: linears, mixers and MLPs, and steps."""

import copy
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from refold.blueprint.integers import FIT_SCHEMES, find_scheme
from refold.blueprint.schema import Blueprint, DepthSpec, MixerPart, MlpPart
from refold.checkpoint.locate import Source
from refold.errors import RefoldError
from refold.families.arch import ArchSpec, Layer, Norm, Rope
from refold.fitting.device_table import (
    DeviceTable,
    LinearTime,
    MeasuredMachine,
    PartTime,
    interpolation_error,
    processor_name,
)
from refold.mixers.attention import Attention
from refold.mixers.linear_attention import LinearAttention
from refold.mixers.spec import MLP, MixerSpec
from refold.modeling.configuration import RefoldConfig
from refold.modeling.load import choose_device, computes_fast
from refold.modeling.model import RefoldForCausalLM
from refold.modeling.recurrent_cache import new_cache
from refold.nn.quantised import QuantisedLinear
from refold.nn.rounding import round_weight
from refold.sources.source_model import read_source_model
from refold.version import __version__

GENERAL_SIZES = (64, 256, 1024, 4096)
"""Rows and columns of linears where no source is given."""
GENERAL_HIDDEN = 1024
SOURCE_SHARES = (0.125, 0.25, 0.5)
"""Beside the sizes of a source, these shares of its hidden size and of its MLP: ranks and narrower parts."""
MULTIPLE, WIDEST_GROUP, ODD = 32, 128, 8
"""Shares are multiples of the first number, the second is a multiple of all groups, and no kernel takes columns that
are a multiple of 32 and the third more."""
MOST_ELEMENTS = 1 << 25
"""A larger linear is not measured, except a head; its time grows with the number of weights."""
MOVED_BYTES = 48 << 20
"""A linear is copied until its copies have so many bytes: in a decoded model no weight stays in a cache."""
MOST_COPIES, MOST_INTEGER_COPIES = 160, 48
"""Integers are packed anew in each copy, which takes time."""
NUM_LAYERS = (2, 6)
"""Layers of the two stacks whose difference is the time of a layer."""
LEAST_ROUNDS = 5
PART_SHARE = 20
PROMPT = 8
"""Tokens before a step of a stack without attention."""
SMALL_VOCABULARY = 256


@dataclass(frozen=True)
class ClockSettings:
    """Settings of a measurement.

    Attributes:
        schemes: Schemes of integers; floats are always measured.
        batches: Numbers of tokens decoded at once.
        contexts: Tokens of the cache at which attention is measured, at most the source's context.
        windows: Windows of linear attention; empty: not measured.
        sizes: Rows and columns of linears; empty: those of the source with shares of them, or `GENERAL_SIZES`.
        seconds: Least time of the rounds of one linear, of which the fastest counts; parts take `PART_SHARE` as long.
        moved_bytes: Bytes of the copies of a linear that are read in turns.
        device: `cpu` or `cuda`; None: the best there is.
        dtype: Dtype of floats; None: bfloat16 where it is fast, else float32.
    """

    schemes: Sequence[str] = FIT_SCHEMES
    batches: Sequence[int] = (1,)
    contexts: Sequence[int] = (64, 512, 2048, 8192)
    windows: Sequence[int] = (0, 64)
    sizes: Sequence[int] = ()
    seconds: float = 0.06
    moved_bytes: int = MOVED_BYTES
    device: str | None = None
    dtype: torch.dtype | None = None


def measure_device(
    path: Path | None = None,
    source: str | Path | Source | None = None,
    settings: ClockSettings | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DeviceTable:
    """Measures the times of one decoded token on this machine, and writes their table.

    Args:
        path: File to write; None: nothing is written.
        source: The model whose shapes are measured; None: a general grid of shapes.
        settings: What is measured.
        progress: Called with the number of measurements done and their total.

    Raises:
        RefoldError: The source or the device is not there, or the file cannot be written.
    """
    how = settings or ClockSettings()
    arch = _general_arch() if source is None else read_source_model(source).arch
    device = choose_device(how.device)
    dtype = how.dtype or (torch.bfloat16 if computes_fast(torch.bfloat16, device) else torch.float32)
    clock = _DeviceTimer(arch, how, device, dtype)
    shapes = list(_shapes(arch, how.sizes, source is not None))
    jobs = [(shape, scheme) for shape in shapes for scheme in (None, *how.schemes)]
    stacks = list(clock.stacks())
    total = len(jobs) + len(stacks)
    linears: list[LinearTime] = []
    for done, (shape, scheme) in enumerate(jobs):
        progress(done, total)
        linears += clock.linear(*shape, scheme)
    table = DeviceTable(machine=_machine(device, dtype), linears=tuple(linears))
    parts: list[PartTime] = []
    step: dict[int, float] = {}
    for done, (spec, context, batch) in enumerate(stacks):
        progress(len(jobs) + done, total)
        part, rest = clock.part(table, spec, context, batch)
        parts.append(part)
        if spec is None:
            step[batch] = rest
    progress(total, total)
    table = table.model_copy(
        update={"parts": tuple(parts), "step": step, "interpolation": interpolation_error(linears)}
    )
    if path is not None:
        table.save(path)
    return table


class _DeviceTimer:
    """Measures times on one device in one dtype."""

    def __init__(self, arch: ArchSpec, settings: ClockSettings, device: torch.device, dtype: torch.dtype):
        self._arch, self._settings, self._device, self._dtype = arch, settings, device, dtype

    @torch.no_grad()
    def linear(self, rows: int, columns: int, scheme: str | None) -> Iterator[LinearTime]:
        """Yields the times of one linear by batch."""
        made = self._make_linear(rows, columns, scheme)
        size = 16 if scheme is None else find_scheme(scheme).bits
        most = MOST_COPIES if scheme is None else MOST_INTEGER_COPIES
        count = max(1, min(most, self._settings.moved_bytes * 8 // (rows * columns * size)))
        # Deep copies of a prepared linear would go back to its stored form.
        copies = [made, *(self._copied(made) for _ in range(count - 1))]
        for batch in self._settings.batches:
            x = torch.randn((batch, 1, columns), device=self._device).to(self._dtype)

            def run(x: torch.Tensor = x) -> None:
                for each in copies:
                    each(x)

            spent = self._alternating([run], self._settings.seconds)[0] / len(copies)
            yield LinearTime(rows=rows, columns=columns, scheme=scheme, batch=batch, milliseconds=spent)

    def stacks(self) -> Iterator[tuple[MixerSpec | None, int, int]]:
        """Yields the stacks to measure: their mixer (None: MLPs alone), context and batch."""
        longest = self._arch.max_position_embeddings
        contexts = sorted({min(context, longest) for context in self._settings.contexts})
        for batch in self._settings.batches:
            yield None, 0, batch
            yield from ((Attention(), context, batch) for context in contexts)
            for window in self._settings.windows:
                spec = LinearAttention(window=window)
                if self._arch.attention_softcap is None or not window:
                    yield spec.resolve(self._arch, "mixers"), window, batch

    def part(self, table: DeviceTable, spec: MixerSpec | None, context: int, batch: int) -> tuple[PartTime, float]:
        """Returns the time of a part beside its linears, and of a step beside its parts and the head.

        Args:
            table: The times of linears.
            spec: The mixer; None: an MLP.
            context: Tokens of the cache.
            batch: Tokens decoded at once.
        """
        few, many = NUM_LAYERS
        stacks = [self._stack(spec, count) for count in NUM_LAYERS]
        steps = [self._step(stack, 0 if spec is None else context, batch) for stack in stacks]
        times = self._alternating(steps, PART_SHARE * self._settings.seconds)
        of_part = (times[1] - times[0]) / (many - few)
        linears = MLP.linears(self._arch) if spec is None else spec.linears(self._arch)
        products = sum(table.linear_ms(*shape, None, None, batch) for shape in linears.values())
        head = table.linear_ms(SMALL_VOCABULARY, self._arch.hidden_size, None, None, batch)
        kind = "mlp" if spec is None else spec.type
        heads = 0 if spec is None else self._arch.num_attention_heads
        made = PartTime(
            kind=kind,
            hidden=self._arch.hidden_size,
            heads=heads,
            head_dim=self._arch.head_dim if heads else 0,
            context=context,
            batch=batch,
            milliseconds=max(0.0, of_part - products),
        )
        return made, max(0.0, times[0] - few * of_part - head)

    def _make_linear(self, rows: int, columns: int, scheme: str | None) -> nn.Module:
        linear = nn.Linear(columns, rows, bias=False).to(self._device, self._dtype)
        if scheme is None:
            return linear
        found = find_scheme(scheme)
        made = QuantisedLinear(linear, found).to(self._device, self._dtype)
        made.set(round_weight(torch.randn((rows, columns), device=self._device) * columns**-0.5, found))
        made.prepare()
        return made

    def _copied(self, linear: nn.Module) -> nn.Module:
        made = copy.deepcopy(linear)
        if isinstance(made, QuantisedLinear):
            made.prepare()
        return made

    def _stack(self, spec: MixerSpec | None, num_layers: int) -> RefoldForCausalLM:
        layers = self._arch.layers[:1] * num_layers
        # The window of the source would hide the growth with the context.
        layers = tuple(layer.model_copy(update={"window": None}) for layer in layers)
        arch = self._arch.model_copy(update={"layers": layers, "vocab_size": SMALL_VOCABULARY, "tied_head": True})
        every = range(num_layers)
        blueprint = Blueprint(
            arch=arch,
            mixers=() if spec is None else tuple(MixerPart(sources=(each,), mixer=spec) for each in every),
            mlps=tuple(MlpPart(sources=(each,)) for each in every) if spec is None else (),
            depths=tuple(
                DepthSpec(
                    source=each,
                    mixer=None if spec is None else each,
                    mlp=each if spec is None else None,
                    rope=layers[each].rope if spec is None or spec.is_rotary else None,
                )
                for each in every
            ),
        )
        config = RefoldConfig(blueprint=blueprint.model_dump(mode="json"), tie_word_embeddings=True)
        made: Any = RefoldForCausalLM(config)
        return made.to(self._device, self._dtype).eval()

    @torch.no_grad()
    def _step(self, model: RefoldForCausalLM, context: int, batch: int) -> Callable[[], None]:
        """Returns a function that decodes one token behind a cache of random keys."""
        cache: Any = new_cache(model.config)
        arch = model.config.read_blueprint().arch
        ids = torch.zeros((batch, 1), dtype=torch.long, device=self._device)
        keeps_keys = all(kind == "full_attention" for kind in model.config.layer_types or ())
        past = max(1, context - 1) if keeps_keys else max(PROMPT, context)
        if keeps_keys:
            shape = (batch, arch.num_key_value_heads, past, arch.head_dim)
            for depth in range(len(arch.layers)):
                keys = torch.randn(shape, device=self._device).to(self._dtype)
                cache.update(keys, keys.clone(), depth)
        else:
            model(ids.expand(batch, past), past_key_values=cache, use_cache=True)

        def run() -> None:
            model(ids, past_key_values=cache, use_cache=True)
            if keeps_keys:
                # The cache stays at its length.
                cache.crop(-1)

        return run

    @torch.no_grad()
    def _alternating(self, runs: Sequence[Callable[[], None]], seconds: float) -> list[float]:
        """Returns the least milliseconds of each function, measured in turns for some seconds."""
        best = [float("inf")] * len(runs)
        # The time of one thread leaves out the time in which other programs had the processor.
        is_alone = self._device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.thread_time if is_alone else time.perf_counter
        rounds, end = 0, clock() + seconds
        while rounds <= LEAST_ROUNDS or clock() < end:
            for index, run in enumerate(runs):
                begun = clock()
                run()
                if self._device.type == "cuda":
                    torch.cuda.synchronize()
                if rounds:
                    best[index] = min(best[index], 1e3 * (clock() - begun))
            rounds += 1
        return best


def _shapes(arch: ArchSpec, given: Sequence[int], is_source: bool) -> Iterator[tuple[int, int]]:
    """Yields the shapes to measure: a grid, and the head."""
    sizes = set(given or GENERAL_SIZES)
    if is_source and not given:
        hidden, heads = arch.hidden_size, arch.head_dim
        full = {hidden, arch.intermediate_size, heads * arch.num_attention_heads, heads * arch.num_key_value_heads}
        shares = [size * share for size in (hidden, arch.intermediate_size) for share in SOURCE_SHARES]
        sizes = full | {max(MULTIPLE, round(size / MULTIPLE) * MULTIPLE) for size in shares}
    ordered = sorted(sizes)
    # Columns for every kernel, and columns for none.
    some = (ordered[0], ordered[len(ordered) // 2], ordered[-1])
    more = {ceil(size / WIDEST_GROUP) * WIDEST_GROUP for size in some} | {size + ODD for size in some}
    grid = {(rows, columns) for rows in sizes for columns in sizes | more if rows * columns <= MOST_ELEMENTS}
    yield from sorted(grid)
    extra = {(SMALL_VOCABULARY, arch.hidden_size)} | ({(arch.vocab_size, arch.hidden_size)} if is_source else set())
    yield from sorted(extra - grid)


def _general_arch() -> ArchSpec:
    heads = GENERAL_HIDDEN // 64
    layer = Layer(rope=Rope(rotary_dim=64))
    return ArchSpec(
        family="llama",
        vocab_size=32_000,
        hidden_size=GENERAL_HIDDEN,
        intermediate_size=4 * GENERAL_HIDDEN,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        max_position_embeddings=8192,
        layers=(layer,),
        norm=Norm(),
        activation="silu",
        attention_scale=64**-0.5,
    )


def _machine(device: torch.device, dtype: torch.dtype) -> MeasuredMachine:
    if device.type not in ("cpu", "cuda"):
        raise RefoldError(f"device: cpu or cuda is required for a table (got {device.type}); give --device cpu")
    return MeasuredMachine(
        processor=torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        system=platform.platform(),
        threads=torch.get_num_threads(),
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        versions={"refold": __version__, "torch": version("torch"), "transformers": version("transformers")},
    )
