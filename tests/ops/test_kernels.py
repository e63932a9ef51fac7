"""Calls of flash-linear-attention, with reference loops written from its documentation in place of its kernels."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from refold.errors import RefoldError
from refold.ops import choice, delta_rule, kernels, scalar_decay

ROOT = Path(__file__).parents[2]
F64 = torch.float64
PLACES = (0, 1, 2, 10, 11, 40, 64)
SERVED = pytest.mark.parametrize(
    "recurrence",
    [
        *(f"scalar-{kind}" for kind in ("token-4", "token-2", "head-4", "head-1", "none-2")),
        *("channel", "delta", "delta-none"),
    ],
    indirect=True,
)
"""All recurrences but the selective scan, which that library has no kernel for."""


def loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    wrong: str,
) -> tuple[Tensor, Tensor | None]:
    """Runs a recurrence sequence by sequence and token by token, as documented: `[B, T, H, .]`.

    States are `[N, H, K, V]` in float32. `decay` broadcasts over keys, `[B, T, H, 1 or K]`. With `beta` this is the
    delta rule. `wrong` names a convention that differs from the documented one.
    """
    assert q.dtype == k.dtype == v.dtype
    assert q.shape == k.shape
    assert v.shape[:3] == q.shape[:3] == decay.shape[:3]
    heads, key, value = *q.shape[2:], v.shape[3]
    bounds = [(row, 0, v.shape[1]) for row in range(len(v))]
    if cu_seqlens is not None:
        assert len(q) == 1
        assert (cu_seqlens.dtype, int(cu_seqlens[0]), int(cu_seqlens[-1])) == (torch.int64, 0, v.shape[1])
        assert bool((cu_seqlens.diff() > 0).all())
        bounds = [(0, int(a), int(b)) for a, b in pairwise(cu_seqlens)]
    if initial_state is not None:
        assert initial_state.dtype == torch.float32
        assert initial_state.shape == (len(bounds), heads, key, value)
    factor = key**-0.5 if scale is None or wrong == "scale" else scale
    rows, states = [[] for _ in v], []
    for number, (row, start, stop) in enumerate(bounds):
        state = torch.zeros(heads, key, value, dtype=F64)
        if initial_state is not None and wrong != "state":
            state = initial_state[number].double()
        if states and wrong == "documents":
            state = states[-1].double()
        for t in range(start, stop):
            gone = decay[row, t].double() if wrong != "logarithm" else decay[row, t].double().exp()
            state = gone.exp()[..., None] * state
            new = v[row, t].double()
            if beta is not None:
                new = (new - (state * k[row, t].double()[..., None]).sum(1)) * beta[row, t].double()[:, None]
            state = state + k[row, t].double()[..., None] * new[:, None, :]
            rows[row].append((q[row, t].double()[..., None] * state).sum(1) * factor)
        states.append(state)
    out = torch.stack([torch.stack(row) for row in rows]).to(q.dtype)
    return out, torch.stack(states).float() if output_final_state else None


@dataclass
class Library:
    """Functions with that library's names and arguments.

    Attributes:
        calls: The calls, with their arguments except queries, keys and values.
        wrong: A convention of `loop` that is broken.
    """

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    wrong: str = ""

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def modules(self) -> dict[str, ModuleType]:
        shared = {"scale", "initial_state", "output_final_state", "cu_seqlens"}
        functions = {
            "simple_gla": {name: {"g", "g_gamma"} for name in ("chunk_simple_gla", "fused_recurrent_simple_gla")},
            "gla": {"chunk_gla": {"g"}, "fused_recurrent_gla": {"gk"}},
            "gated_delta_rule": {
                "chunk_gated_delta_rule": {"g", "beta"},
                "fused_recurrent_gated_delta_rule": {"g", "beta"},
            },
            "delta_rule": {"chunk_delta_rule": {"beta"}},
        }
        made = {"fla": ModuleType("fla"), "fla.ops": ModuleType("fla.ops")}
        vars(made["fla"])["__version__"] = "0.6.0"
        for module, named in functions.items():
            made[f"fla.ops.{module}"] = ModuleType(f"fla.ops.{module}")
            for name, own in named.items():
                setattr(made[f"fla.ops.{module}"], name, self._function(name, own | shared))
        return made

    def _function(self, name: str, allowed: set[str]) -> Callable[..., Any]:
        def function(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Any:
            assert set(given) <= allowed, name
            self.calls.append((name, given))
            given = {"scale": None, "initial_state": None, "cu_seqlens": None, "output_final_state": False} | given
            beta, g, gamma = given.pop("beta", None), given.pop("g", None), given.pop("g_gamma", None)
            if name == "chunk_delta_rule":
                assert q.dtype != torch.float32
            if name == "fused_recurrent_gated_delta_rule":
                assert not torch.is_grad_enabled()
            if name in ("chunk_gla", "fused_recurrent_gla"):
                decay = g if g is not None else given.pop("gk")
                assert decay.shape == q.shape
            elif gamma is not None:
                assert g is None
                assert gamma.shape == q.shape[2:3]
                decay = gamma.detach().expand(q.shape[:3])[..., None]
            else:
                assert g is not None or name != "chunk_gated_delta_rule"
                decay = (torch.zeros_like(v[..., 0]) if g is None else g)[..., None]
            return loop(q, k, v, decay=decay, beta=beta, wrong=self.wrong, **given)

        return function


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """As if the CPU were a device with kernels."""
    made = Library()
    for name, module in made.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(kernels, "DEVICES", ("cpu",))
    monkeypatch.setattr(kernels, "_are_installed", lambda: True)
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    kernels._find.cache_clear()
    monkeypatch.setattr(kernels, "_find", kernels._find.__wrapped__)
    return made


def run(recurrence: Any, resets: Tensor | None = None) -> Callable[..., tuple[Tensor, Tensor]]:
    """The recurrence as mixers call it, with the arguments of its other forms."""

    def take(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, **rates: Tensor | None) -> tuple[Tensor, Tensor]:
        return choice.run(recurrence.ops, q, k, v, *rates.values(), state=state, resets=resets)

    return take


def resets_at(tokens: int, *places: int) -> Tensor:
    """Documents of the first row begin at `places`; the second has one begin in the middle."""
    resets = torch.zeros(2, tokens, dtype=torch.bool)
    resets[0, [place for place in places if place < tokens]] = True
    resets[1, tokens // 2] = True
    return resets


def off(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference as a share of the largest number."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(found, wanted, strict=True)]
    shares = [(a - b).abs().max() / b.abs().max().clamp(min=1e-3) for a, b in pairs]
    return float(torch.stack([share.double() for share in shares]).max())


@SERVED
@pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])
@pytest.mark.parametrize("state", [False, True], ids=["empty", "going-on"])
@pytest.mark.parametrize("tokens", [1, 2, 66])
def test_outputs_states_and_gradients_are_ours(
    library: Library, recurrence: Any, tokens: int, state: bool, packed: bool
) -> None:
    inputs, resets = recurrence.inputs(tokens, torch.float32, state), resets_at(tokens, *PLACES) if packed else None
    found = recurrence.results(run(recurrence, resets), inputs)
    assert off(found, recurrence.results(recurrence.ops.naive, inputs, resets=resets)) < 1e-5
    assert (found[0].dtype, found[1].dtype) == (torch.float32, torch.float32)
    is_single = tokens == 1 and state and not packed
    assert len(library.calls) == (0 if is_single else 1), "a single token's kernel has no gradients"


@SERVED
def test_a_single_token_is_taken_in_by_a_loop(library: Library, recurrence: Any) -> None:
    inputs = recurrence.inputs(1, torch.float32)
    with torch.no_grad():
        found = run(recurrence)(**inputs)
    assert off(list(found), list(recurrence.ops.naive(**inputs))) < 1e-5
    assert library.names[0].startswith("fused_recurrent_")


@SERVED
@pytest.mark.parametrize("wrong", ["scale", "state", "documents", "logarithm"])
def test_another_convention_would_be_seen(library: Library, recurrence: Any, wrong: str) -> None:
    library.wrong = wrong
    inputs, resets = recurrence.inputs(20, torch.float32), resets_at(20, 3, 5)
    found, wanted = run(recurrence, resets)(**inputs), recurrence.ops.naive(**inputs, resets=resets)
    assert off([found[0]], [wanted[0]]) > 0.01


@pytest.mark.parametrize("recurrence", ["delta-none"], indirect=True)
def test_the_delta_rule_without_decays_has_a_kernel_in_half_precision_only(library: Library, recurrence: Any) -> None:
    for dtype, name in ((torch.float32, "chunk_gated_delta_rule"), (torch.bfloat16, "chunk_delta_rule")):
        inputs = recurrence.inputs(9, dtype) | {"state": None}
        out, state = run(recurrence)(**inputs)
        assert library.names[-1] == name
        wanted = recurrence.ops.naive(**{key: x if x is None else x.float() for key, x in inputs.items()})
        assert (out.dtype, state.dtype) == (dtype, torch.float32)
        assert off([out.float(), state], list(wanted)) < 0.01


def test_queries_and_keys_come_in_the_values_dtype_and_rates_in_float32(library: Library) -> None:
    q, k, v = (torch.randn(1, 4, 2, 8) for _ in range(3))
    rates = torch.rand(1, 4, 2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = choice.run(delta_rule, q, k, v.bfloat16(), rates, -rates, state=None, resets=None)
    given = library.calls[0][1]
    assert (out.dtype, given["g"].dtype, given["beta"].dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_a_decay_per_head_goes_as_such_unless_it_learns(library: Library) -> None:
    q, k, v = (torch.randn(2, 3, 4, 6) for _ in range(3))
    fixed = -torch.rand(4)
    choice.run(scalar_decay, q, k, v, fixed, state=None, resets=None)
    choice.run(scalar_decay, q, k, v, fixed.clone().requires_grad_(), state=None, resets=None)
    choice.run(scalar_decay, q, k, v, None, state=None, resets=None)
    found = [set(given) & {"g", "g_gamma"} for _, given in library.calls]
    assert found == [{"g_gamma"}, {"g"}, set()]


def test_all_depths_of_a_pass_share_where_documents_are(library: Library) -> None:
    q, k, v = (torch.randn(2, 9, 1, 4) for _ in range(3))
    one, other = resets_at(9, 2, 5), resets_at(9, 3)
    for resets in (one, one, other):
        choice.run(scalar_decay, q, k, v, None, state=None, resets=resets)
    first, second, third = (given["cu_seqlens"] for _, given in library.calls)
    assert first is second
    assert first.tolist() == [0, 2, 5, 9, 13, 18]
    assert third.tolist() == [0, 3, 9, 13, 18]


@pytest.mark.parametrize(
    ("dtype", "key", "value"),
    [(F64, 8, 8), (torch.bfloat16, 7, 8), (torch.float16, 8, 7), (torch.float32, 258, 8)],
    ids=["float64", "odd-keys", "odd-values", "large-keys"],
)
def test_what_kernels_cannot_do_is_done_without_them(
    library: Library, dtype: torch.dtype, key: int, value: int
) -> None:
    q, k, v = (torch.randn(1, 3, 2, size, dtype=dtype) * 0.1 for size in (key, key, value))
    beta = torch.rand(1, 3, 2, dtype=dtype)
    found = choice.run(delta_rule, q, k, v, beta, None, state=None, resets=None)
    assert not library.calls
    assert all(map(torch.equal, found, delta_rule.chunked(q, k, v, beta)))


def test_the_environment_can_leave_kernels_out(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 3, 2, 4) for _ in range(3))
    monkeypatch.setenv(kernels.VARIABLE, "torch")
    found = choice.run(scalar_decay, q, k, v, None, state=None, resets=None)
    assert not library.calls
    assert torch.equal(found[0], scalar_decay.chunked(q, k, v, None)[0])
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    with pytest.raises(RefoldError, match=r"REFOLD_KERNELS: auto or torch is required \(got triton\); set one"):
        choice.run(scalar_decay, q, k, v, None, state=None, resets=None)


def test_an_old_or_broken_installation_is_an_error_with_the_way_out(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (torch.randn(1, 3, 2, 4) for _ in range(3))
    monkeypatch.setattr(sys.modules["fla"], "__version__", "0.4.2")
    wanted = r"flash-linear-attention 0\.5 or newer is required \(got 0\.4\.2\); .*REFOLD_KERNELS=torch"
    with pytest.raises(RefoldError, match=wanted):
        choice.run(scalar_decay, q, k, v, None, state=None, resets=None)
    monkeypatch.setattr(sys.modules["fla"], "__version__", "0.6.0")
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", None)
    with pytest.raises(RefoldError, match=r"with chunk_simple_gla is required \(got .*REFOLD_KERNELS=torch"):
        choice.run(scalar_decay, q, k, v, None, state=None, resets=None)


SCRIPT = """
import sys, torch
from refold.nn.mixers.registry import MIXERS
from refold.ops import channel_decay, choice, delta_rule, kernels, scalar_decay
assert kernels._are_installed()
q, k, v = (torch.randn(1, 70, 2, 4, requires_grad=True) for _ in range(3))
resets = torch.zeros(1, 70, dtype=torch.bool)
resets[0, 7] = True
rates = -torch.rand(1, 70, 2)
for ops, more in ((scalar_decay, [rates]), (channel_decay, [-k.detach().abs()]), (delta_rule, [-rates, rates])):
    out, state = choice.run(ops, q, k, v, *more, state=None, resets=resets)
    out.sum().backward()
    with torch.no_grad():
        one = [x[:, :1] for x in (q, k, v, *more)]
        choice.run(ops, *one, state=state, resets=None)
assert not any(name.split(".")[0] in ("fla", "mamba_ssm", "causal_conv1d") for name in sys.modules)
print("whole")
"""


def test_on_a_cpu_the_library_is_never_imported(tmp_path: Path) -> None:
    for name in ("fla", "mamba_ssm", "causal_conv1d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported where it breaks')\n")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("whole\n", 0), done.stderr
    done = subprocess.run(
        [sys.executable, "-c", "import fla"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert "imported where it breaks" in done.stderr
