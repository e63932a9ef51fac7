"""Mamba: a selective state-space model with a decay for each channel and state."""

from collections.abc import Mapping
from typing import Any, Literal

from refold.families.arch import ArchSpec
from refold.fields import Count
from refold.mixers.heads import carried_norms, carry_output
from refold.mixers.placement import MixerSwap
from refold.mixers.spec import Carried, Fill, PartSpec, Shape, outer_norms


class Mamba(MixerSwap):
    """Replaces attention by Mamba (arXiv 2312.00752)."""

    type: Literal["mamba"] = "mamba"
    width: Count | None = None
    """Channels inside; left out: twice the hidden size."""
    state: Count = 16
    """Numbers of state for each channel."""
    conv: Count = 4
    """Width of the short convolution."""
    dt_rank: Count | None = None
    """Rank of the step sizes' projection; left out: a sixteenth of the hidden size, rounded up."""


def resolve(arch: ArchSpec, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the options with width and rank filled in."""
    width = options["width"] or 2 * arch.hidden_size
    return dict(options, width=width, dt_rank=options["dt_rank"] or -(-arch.hidden_size // 16))


def linears(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    width, rank = options["width"], options["dt_rank"]
    return {
        "v_proj": (width, arch.hidden_size),
        "g_proj": (width, arch.hidden_size),
        "select_proj": (rank + 2 * options["state"], width),
        "dt_proj": (width, rank),
        "o_proj": (arch.hidden_size, width),
    }


def vectors(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, Shape]:
    width = options["width"]
    return outer_norms(arch) | {
        "dt_proj.bias": (width,),
        "decay.a_log": (width, options["state"]),
        "skip.d": (width,),
        "conv.weight": (width, options["conv"]),
        "conv.bias": (width,),
    }


def fills(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, Fill]:
    return {
        "dt_proj.bias": Fill("softplus_inverse", 0.001, 0.1),
        "decay.a_log": Fill("log_range"),
        "skip.d": Fill("constant", 1.0),
        "conv.weight": Fill("last_tap"),
        "conv.bias": Fill("constant", 0.0),
    }


def carried(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, Carried]:
    """The output projection and the values, where the channels inside are as many as the source's."""
    width, values = options["width"], arch.num_key_value_heads * arch.head_dim
    repeat = width // values if width == arch.num_attention_heads * arch.head_dim else 1
    misfit = "" if width == repeat * values else f"the source's is {values} wide, this mixer's {width}"
    new = {
        name: Carried(f"mixer.{name}.weight", name, misfit="this mixer computes them from its values")
        for name in ("q_proj", "k_proj")
    }
    return carried_norms(arch) | {
        **{f"{name}.weight": each for name, each in new.items()},
        "v_proj.weight": Carried("mixer.v_proj.weight", "v_proj", repeat, misfit),
        "o_proj.weight": carry_output(arch, width),
    }


def recurrence_flops(arch: ArchSpec, options: Mapping[str, Any]) -> int:
    width = options["width"]
    return 7 * width * options["state"] + 2 * options["conv"] * width


SPEC = PartSpec(
    name="mamba",
    url="https://arxiv.org/abs/2312.00752",
    linears=linears,
    vectors=vectors,
    flops_per_token=recurrence_flops,
    state_elements=lambda arch, options: options["width"] * options["state"],
    kept_elements=lambda arch, options: (options["conv"] - 1) * options["width"],
    fills=fills,
    carried=carried,
    rotary=lambda options: False,
    resolve=resolve,
    is_recurrent=True,
)
