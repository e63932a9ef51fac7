"""Transformers-style folder of a Llama whose layers can lack attention or MLP (DeciLM, Puzzle)."""

import math
from typing import Any

from refold.blueprint.cost import count_parameters
from refold.blueprint.owned.registry import OWNED
from refold.blueprint.part_sizes import head_counts, neuron_counts
from refold.blueprint.schema import Blueprint
from refold.exporting.llama_shaped import StoredLayer, llama_obstacles, stored_tensors
from refold.exporting.target import ExportJob, ExportOptions, ExportTarget, Obstacle, Verdict, impossible
from refold.exporting.unrolled import dense_arch, kept_depths
from refold.families.arch import ArchSpec

WIDTH_STEP = 256
"""MLPs are as wide as the next multiple of this number, counted from a multiplier."""


class NemotronNasTarget(ExportTarget):
    """A folder whose config has `block_configs`, which engines with the class `DeciLMForCausalLM` run."""

    name = "nemotron-nas"
    url = "https://arxiv.org/abs/2411.19146"
    summary = "folder of a Llama whose dropped attention and MLPs stay dropped"
    engines = ("mlx-lm",)
    usage = """\
from mlx_lm import generate, load

model, tokenizer = load("THIS FOLDER")
print(generate(model, tokenizer, prompt="Once upon a time"))"""

    def judge(self, blueprint: Blueprint) -> Verdict:
        obstacles = _obstacles(blueprint)
        if obstacles:
            return impossible(obstacles)
        lost = tuple(sentence for kind in OWNED for sentence in kind.lost(blueprint))
        if self._count(blueprint) <= count_parameters(blueprint).total:
            return Verdict("kept", lost)
        return Verdict("larger", ("tied weights are repeated, or factors are multiplied out", *lost))

    def count_bytes(self, blueprint: Blueprint, options: ExportOptions) -> int:
        return self._count(blueprint) * options.dtype_bytes

    def write(self, job: ExportJob) -> tuple[str, ...]:
        from refold.exporting.stock.llama_folder import write_llama_folder

        arch, layers = dense_arch(job.blueprint), _layers(job.blueprint)
        fields = {
            "architectures": ["DeciLMForCausalLM"],
            "model_type": "nemotron-nas",
            "block_configs": [_block(layer.arch or arch, layer) for layer in layers],
        }
        notes = write_llama_folder(job, layers, fields)
        without = sum(len(layer.pools) < 2 for layer in layers)
        return (f"{len(layers)} layers, {without} of them without attention or without an MLP", *notes)

    def _count(self, blueprint: Blueprint) -> int:
        return sum(math.prod(each.shape) for _, each in stored_tensors(dense_arch(blueprint), _layers(blueprint)))


def find_multiplier(width: int, hidden_size: int) -> float | None:
    """Returns the `ffn_mult` that engines turn into an MLP's width; None: there is none.

    They compute `int(2 mult hidden / 3)`, rounded up to a multiple of 256.
    """
    if width % WIDTH_STEP:
        return None
    # Half a step below the width rounds up to it whatever the rounding of the multiplier.
    for wanted in (float(width), width - WIDTH_STEP / 2):
        multiplier = round(3.0 * wanted / (2.0 * hidden_size), 6)
        raw = int(2 * multiplier * hidden_size / 3)
        if raw + -raw % WIDTH_STEP == width:
            return multiplier
    return None


def _obstacles(blueprint: Blueprint) -> list[Obstacle]:
    found = llama_obstacles(blueprint, "nemotron-nas")
    if found:
        return found
    arch = dense_arch(blueprint)
    for size in neuron_counts(blueprint) or [arch.intermediate_size]:
        if find_multiplier(size, arch.hidden_size) is None:
            required = f"MLPs whose width is a multiple of {WIDTH_STEP}"
            found.append(Obstacle(required, f"got {size}", ""))
            break
    heads = head_counts(blueprint)
    if len(heads) > 1:
        got = f"got {', '.join(map(str, heads))}"
        found.append(Obstacle("the same number of key-value heads at every depth", got, "width.split=even"))
    width = arch.num_attention_heads * arch.head_dim
    if width != arch.hidden_size:
        found.append(Obstacle("query heads as wide as the hidden size in all", f"{width} and {arch.hidden_size}", ""))
    return found


def _layers(blueprint: Blueprint) -> list[StoredLayer]:
    found, arch = [], dense_arch(blueprint)
    for index in kept_depths(blueprint):
        depth = blueprint.depths[index]
        there = (("mixer", depth.mixer), ("mlp", depth.mlp))
        pools = tuple(pool for pool, part in there if part is not None)
        own = arch.model_copy(update={"intermediate_size": blueprint.part_arch("mlp", depth.mlp).intermediate_size})
        found.append(StoredLayer(index, pools, own))
    return found


def _block(arch: ArchSpec, layer: StoredLayer) -> dict[str, Any]:
    has_attention, has_mlp = "mixer" in layer.pools, "mlp" in layer.pools
    group = arch.num_attention_heads // arch.num_key_value_heads
    return {
        "attention": {
            "no_op": not has_attention,
            "replace_with_linear": False,
            "n_heads_in_group": group if has_attention else None,
        },
        "ffn": {
            "no_op": not has_mlp,
            "replace_with_linear": False,
            "ffn_mult": find_multiplier(arch.intermediate_size, arch.hidden_size) if has_mlp else None,
        },
    }


NEMOTRON_NAS = NemotronNasTarget()
